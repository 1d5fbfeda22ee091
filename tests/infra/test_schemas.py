"""Each file of infra/ is what its tool takes, by the schema or the parser that the tool ships."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.infra.files import INFRA, load, load_all

BIN = Path(sys.executable).parent
COMPOSE_SCHEMA = "compose-spec.json"
KUBERNETES = "1.37.0"
# Neither PyPI, npm nor Debian has KubeRay's CRD, so what rayjob.yaml uses of ray.io/v1 stands here:
# fields with the type of their values (RayJobSpec, RayClusterSpec of KubeRay 1.5.1). Pod templates
# go through Kubernetes' own schema.
RAY_JOB = {
    "submissionMode": str,
    "entrypoint": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": {
        "rayVersion": str,
        "authOptions": {"mode": str},
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": {"idleTimeoutSeconds": int, "securityContext": dict},
        "headGroupSpec": {"rayStartParams": dict, "template": dict},
        "workerGroupSpecs": [
            {
                "groupName": str,
                "replicas": int,
                "minReplicas": int,
                "maxReplicas": int,
                "rayStartParams": dict,
                "template": dict,
            }
        ],
    },
}


def check_compose(content: Any) -> None:
    """By the Compose Specification's schema, which check-jsonschema ships."""
    schema = files("check_jsonschema").joinpath("builtin_schemas", "vendor", COMPOSE_SCHEMA)
    jsonschema.validate(content, yaml.safe_load(schema.read_text()))


def check_ray_cluster(content: Any) -> None:
    """As `ray up` does before it starts anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(content)))


def check_pod_template(template: dict[str, Any]) -> None:
    """By Kubernetes' schema, which refuses unknown fields."""
    whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "one"}}
    kubernetes_validate.validate(whole | {"template": template}, KUBERNETES, strict=True)


def check_ray_job(content: Any) -> None:
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayJob")
    check_fields(content["spec"], RAY_JOB, "spec")
    cluster = content["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(text, str) for text in group["rayStartParams"].values())
        check_pod_template(group["template"])
    autoscaler = {"name": "a", "securityContext": cluster["autoscalerOptions"]["securityContext"]}
    check_pod_template({"spec": {"containers": [autoscaler]}})


def check_fields(content: Any, fields: Any, place: str) -> None:
    """Every field is known and its value of the known type."""
    if isinstance(fields, dict):
        assert isinstance(content, dict), place
        for key, value in content.items():
            assert key in fields, f"{place}: unknown field {key}"
            check_fields(value, fields[key], f"{place}.{key}")
    elif isinstance(fields, list):
        assert isinstance(content, list), place
        for value in content:
            check_fields(value, fields[0], f"{place}[]")
    else:
        assert type(content) is fields, f"{place}: {content!r} is no {fields.__name__}"


def check_kubernetes(content: Any) -> None:
    kubernetes_validate.validate(content, KUBERNETES, strict=True)


REFUSED = (
    AssertionError,
    ValueError,
    jsonschema.ValidationError,
    kubernetes_validate.ValidationError,
)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_follow_the_specification(name: str) -> None:
    check_compose(load(name))


def test_ray_up_takes_the_cluster() -> None:
    check_ray_cluster(load("ray-cluster.yaml"))


def test_kuberay_takes_the_job() -> None:
    check_ray_job(load("kubernetes/rayjob.yaml"))


def test_kubernetes_takes_the_shared_folder() -> None:
    claim, pod = load_all("kubernetes/shared.yaml")
    check_kubernetes(claim)
    check_kubernetes(pod)


@pytest.mark.parametrize(
    ("name", "check", "where", "value"),
    [
        ("compose.yaml", check_compose, "services.mlflow.healthchek", {}),
        ("compose.yaml", check_compose, "services.mlflow.command", {"mlflow": "server"}),
        ("compose.yaml", check_compose, "services.s3.ports", "7070"),
        ("compose.gpu.yaml", check_compose, "services.ray-worker.deploy.resources.gpus", 1),
        ("ray-cluster.yaml", check_ray_cluster, "max_worker", 8),
        ("ray-cluster.yaml", check_ray_cluster, "head_node_type", "heads"),
        ("ray-cluster.yaml", check_ray_cluster, "available_node_types.gpu.min_worker", 0),
        ("ray-cluster.yaml", check_ray_cluster, "docker.image", None),
        ("kubernetes/rayjob.yaml", check_ray_job, "spec.entryPoint", "dvc repro"),
        ("kubernetes/rayjob.yaml", check_ray_job, "spec.ttlSecondsAfterFinished", "600"),
        (
            "kubernetes/rayjob.yaml",
            check_ray_job,
            "spec.rayClusterSpec.autoscalerOptions.securityContext.runAsNonroot",
            True,
        ),
        (
            "kubernetes/rayjob.yaml",
            check_ray_job,
            "spec.rayClusterSpec.headGroupSpec.template.spec.securityContext.runAsUser",
            "1000",
        ),
        (
            "kubernetes/rayjob.yaml",
            check_ray_job,
            "spec.rayClusterSpec.headGroupSpec.template.spec.container",
            [],
        ),
    ],
)
def test_a_broken_file_is_refused(
    name: str, check: Callable[[Any], None], where: str, value: Any
) -> None:
    content = copy.deepcopy(load(name))
    inner = content
    *path, last = where.split(".")
    for key in path:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(REFUSED):
        check(content)


def hadolint(content: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "hadolint"), "--no-color", "-"]
    return subprocess.run(command, input=content, capture_output=True, text=True)


def test_the_dockerfile_parses_without_a_warning() -> None:
    done = hadolint((INFRA / "Dockerfile").read_text())
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("USER 1000:1000", "USE 1000:1000"),
        ("USER 1000:1000", "USER root"),
        ("uv==0.13.9", "uv"),
        ("--from=environment", "--from=nowhere"),
    ],
)
def test_a_broken_dockerfile_is_refused(old: str, new: str) -> None:
    whole = (INFRA / "Dockerfile").read_text()
    assert old in whole
    assert hadolint(whole.replace(old, new)).returncode != 0
