"""How a model is trained: the settings, checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vae.checks import check_name
from vae.models import PRECISIONS
from vae.optimizers import OPTIMIZERS

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained; the section `training` of params.yaml.

    Raises ValueError naming every faulty key at once.
    """

    epochs: int = 100
    batch_size: int = 128  # examples a step, over all workers
    optimizer: str = "adam"  # or muon
    learning_rate: float = 1e-3
    schedule: str = "constant"  # or cosine, to zero at the last step
    weight_decay: float = 0.0  # decoupled
    gradient_clip: float | None = None  # largest norm of the gradient; None: not clipped
    patience: int | None = None  # epochs without a better validation bound; None: no early stop
    precision: str = "fp32"  # of the networks' matrix products; or bf16
    seed: int = 0
    memory_limit_mb: int | None = None  # larger training arrays are streamed; None: never

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ValueError("\n".join(faults))

    def _faults(self) -> Iterator[str]:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                yield f"training.{name}: expected at least 1, got {getattr(self, name)!r}"
        if not 0 < self.learning_rate < math.inf:
            yield f"training.learning_rate: expected above 0, got {self.learning_rate!r}"
        yield from check_name("training.optimizer", self.optimizer, OPTIMIZERS)
        yield from check_name("training.schedule", self.schedule, SCHEDULES)
        yield from check_name("training.precision", self.precision, PRECISIONS)
        if not 0 <= self.weight_decay < math.inf:
            yield f"training.weight_decay: expected at least 0, got {self.weight_decay!r}"
        if self.gradient_clip is not None and not 0 < self.gradient_clip < math.inf:
            yield f"training.gradient_clip: expected above 0, or null, got {self.gradient_clip!r}"
        if self.patience is not None and self.patience < 1:
            yield f"training.patience: expected at least 1, or null, got {self.patience!r}"
        if self.memory_limit_mb is not None and self.memory_limit_mb < 1:
            yield (
                "training.memory_limit_mb: expected at least 1, or null, got "
                f"{self.memory_limit_mb!r}"
            )
        if not 0 <= self.seed < 2**63:
            yield f"training.seed: expected at least 0, got {self.seed!r}"
