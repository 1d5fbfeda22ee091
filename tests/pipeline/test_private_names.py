"""Canaries: what is used of other libraries without being public is still as it was.

docs/reliability.md lists each name with what happens without it.
"""

from __future__ import annotations

import atexit
import ctypes
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.cluster import connect
from vae.fast import perceptron

ROOT = Path(__file__).parents[2]


def parameters(path: str, *expected: str) -> Callable[[], None]:
    """The callable is there and has these parameters."""

    def check() -> None:
        assert tuple(inspect.signature(found(path)).parameters) == expected

    return check


def found(path: str) -> Any:
    """What a dotted path names: attributes of the longest module in it."""
    names = path.split(".")
    for length in range(len(names), 0, -1):
        try:
            thing: Any = import_module(".".join(names[:length]))
        except ModuleNotFoundError:
            continue
        for name in names[length:]:
            thing = getattr(thing, name)
        return thing
    raise AssertionError(path)


def exists(path: str) -> Callable[[], None]:
    def check() -> None:
        assert found(path) is not None

    return check


def hooks(kind: type, names: tuple[str, ...]) -> Callable[[], None]:
    def check() -> None:
        one = (
            torch.nn.Linear(1, 1) if kind is torch.nn.Module else torch.nn.Parameter(torch.ones(1))
        )
        assert not any(getattr(one, name) for name in names)

    return check


def read_body() -> None:
    from starlette.requests import Request

    assert "_body" in inspect.getsource(Request.body)


def serving_flag() -> None:
    from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT

    assert _MLFLOW_IS_IN_SERVING_ENVIRONMENT.name == "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"


def dvc_names() -> None:
    from dvc.env import DVC_ROOT
    from dvc.repo.experiments.utils import EXEC_TMP_DIR
    from dvc.stage import run

    assert DVC_ROOT == "DVC_ROOT"
    assert EXEC_TMP_DIR == "exps"
    assert "DVC_STAGE" in inspect.getsource(run)


RAY = "ray.train.v2._internal"
CANARIES: dict[str, Callable[[], Any]] = {
    f"{RAY}.callbacks.datasets.DatasetsCallback": exists(
        f"{RAY}.callbacks.datasets.DatasetsCallback"
    ),
    f"{RAY}.callbacks.placement_group_callback.PlacementGroupCleanerCallback": exists(
        f"{RAY}.callbacks.placement_group_callback.PlacementGroupCleanerCallback"
    ),
    f"{RAY}.execution.scaling_policy.FixedScalingPolicy": exists(
        f"{RAY}.execution.scaling_policy.FixedScalingPolicy._maybe_send_resource_request"
    ),
    "ray.train.torch.TorchTrainer._create_default_callbacks": parameters(
        "ray.train.torch.TorchTrainer._create_default_callbacks", "self"
    ),
    "ray.train.torch.TorchTrainer._initialize_and_run_controller": parameters(
        "ray.train.torch.TorchTrainer._initialize_and_run_controller",
        "self",
        "controller_init_kwargs",
    ),
    "ray._private.state.state": exists(
        "ray._private.state.state.get_max_resources_from_cluster_config"
    ),
    "mlflow.pyfunc._validate_prediction_input": exists("mlflow.pyfunc._validate_prediction_input"),
    "mlflow.pyfunc.scoring_server._async_catch_mlflow_exception": exists(
        "mlflow.pyfunc.scoring_server._async_catch_mlflow_exception"
    ),
    "starlette.requests.Request._body": read_body,
    "_MLFLOW_IS_IN_SERVING_ENVIRONMENT": serving_flag,
    "torch.nn.Module._apply": parameters("torch.nn.Module._apply", "self", "fn", "recurse"),
    "torch.nn.Module._forward_hooks": hooks(torch.nn.Module, perceptron.MODULE_HOOKS),
    "torch.Tensor._backward_hooks": hooks(torch.Tensor, perceptron.PARAMETER_HOOKS),
    "atexit._run_exitfuncs": lambda: callable(atexit._run_exitfuncs) or pytest.fail("gone"),
    "renameat2": lambda: ctypes.CDLL(None).renameat2,
    "mallopt": lambda: ctypes.CDLL(None).mallopt,
    "DVC_ROOT": dvc_names,
}


@pytest.mark.parametrize("name", CANARIES)
def test_it_is_as_it_was(name: str) -> None:
    CANARIES[name]()


def test_the_page_lists_them_all_and_no_other() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text().partition("## Private names")[2]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    listed = [re.match(r"\| `([^`]+)`", line)[1] for line in rows]  # type: ignore[index]
    assert sorted(listed) == sorted(CANARIES)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("", "LocalTrainer"),
        ("del policy.FixedScalingPolicy", "TorchTrainer"),
        ("sys.modules['ray.train.v2._internal.callbacks.datasets'] = None", "TorchTrainer"),
        ("ray.train.torch.TorchTrainer._create_default_callbacks = lambda self, more: 0",
         "TorchTrainer"),
        ("del ray.train.torch.TorchTrainer.__mro__[1]._initialize_and_run_controller",
         "TorchTrainer"),
    ],
)  # fmt: skip
def test_ray_s_own_trainer_trains_where_a_name_is_gone(change: str, name: str) -> None:
    program = (
        "import sys, ray.train.torch\n"
        "import ray.train.v2._internal.execution.scaling_policy as policy\n"
        f"{change}\n"
        "from pipeline.train.local_trainer import trainer_class\n"
        "print(trainer_class().__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-1:] == [name], done.stderr


def test_a_cluster_that_can_not_be_asked_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray._private.state", SimpleNamespace())
    assert connect._autoscaler_most() == {}


def test_a_model_whose_hooks_can_not_be_seen_takes_no_fast_path() -> None:
    assert not perceptron.is_hooked(torch.nn.Linear(1, 1))
    assert perceptron.is_hooked(SimpleNamespace(parameters=lambda recurse: []))  # type: ignore[arg-type]


def test_serving_is_refused_where_a_request_can_not_be_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow.exceptions import MlflowException

    from pipeline.register.served_model import bound_requests

    monkeypatch.setitem(sys.modules, "mlflow.pyfunc.scoring_server", SimpleNamespace())
    bound_requests()  # in process there is no request
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    with pytest.raises(MlflowException, match="refuses to be served: MLflow no longer has"):
        bound_requests()
