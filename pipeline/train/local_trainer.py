"""Ray Train on a Ray that starts with the stage and ends with it, without what only clusters need.

Ray Train starts four Python processes beside its controller and workers, two of them while these
wait: bench/train_costs.py measures it.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy


class LocalTrainer(TorchTrainer):
    """`TorchTrainer` for a fixed number of workers on a local Ray.

    Left out: the actor that asks an autoscaler for nodes; the one that frees placement groups of a
    controller that died (a local Ray dies with it); and, where nothing goes through Ray Data, the
    one that splits its data sets. Ray has no public way to leave them out, hence the private names;
    `TorchTrainer` in its place trains the same, and starts 5 s later.
    """

    def _create_default_callbacks(self) -> list[Any]:
        needless = (PlacementGroupCleanerCallback,)
        if not self.datasets:
            needless += (DatasetsCallback,)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, needless)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = _WithoutAutoscaler(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


class _WithoutAutoscaler(FixedScalingPolicy):
    """The number of workers is fixed, and no nodes can be asked for."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass
