"""Ray Train on a Ray that starts with the stage and ends with it, without what only clusters need.

Ray Train starts four Python processes beside its controller and workers, two of them while these
wait: bench/train_costs.py measures it. Ray has no public way to leave them out; where its private
names are gone or have changed, `trainer_class` gives Ray's own `TorchTrainer`, which trains the
same and starts 5 s later.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ray.train.torch import TorchTrainer

PARAMETERS: dict[str, list[str]] = {
    "_create_default_callbacks": ["self"],
    "_initialize_and_run_controller": ["self", "controller_init_kwargs"],
}
"""What is overridden of `TorchTrainer`, with the parameters that it had when this was written."""

try:
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
except ImportError:
    NEEDLESS: tuple[type, ...] = ()
    ASKS_FOR_NODES = False
    _WithoutAutoscaler: Callable[..., Any] | None = None
else:
    ASKS_FOR_NODES = hasattr(FixedScalingPolicy, "_maybe_send_resource_request")
    NEEDLESS = (PlacementGroupCleanerCallback, DatasetsCallback)

    class _WithoutAutoscaler(FixedScalingPolicy):  # type: ignore[no-redef]
        """The number of workers is fixed, and no nodes can be asked for."""

        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass


class LocalTrainer(TorchTrainer):
    """`TorchTrainer` for a fixed number of workers on a local Ray.

    Left out: the actor that asks an autoscaler for nodes; the one that frees placement groups of a
    controller that died (a local Ray dies with it); and, where nothing goes through Ray Data, the
    one that splits its data sets.
    """

    def _create_default_callbacks(self) -> list[Any]:
        needless = NEEDLESS[:1] if self.datasets else NEEDLESS
        return [one for one in super()._create_default_callbacks() if not isinstance(one, needless)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        assert _WithoutAutoscaler is not None
        arguments["scaling_policy"] = _WithoutAutoscaler(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


def trainer_class() -> type[TorchTrainer]:
    """`LocalTrainer`, or Ray's own where what it needs of Ray is not as it was."""
    if _WithoutAutoscaler is None or not ASKS_FOR_NODES:
        return TorchTrainer
    for name, expected in PARAMETERS.items():
        method = getattr(TorchTrainer, name, None)
        if method is None or list(inspect.signature(method).parameters) != expected:
            return TorchTrainer
    return LocalTrainer
