"""What training knows of itself: what an epoch told, and where to go on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from torch import Tensor

from vae.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class EpochStats:
    """One finished epoch: means over examples, in nats.

    train_*: during the epoch, in the measure that is trained (dequantised where the likelihood
    is); valid_*: after it, in the space's reporting measure, every example once, with the same
    noise each epoch. `valid_bound` is the objective's own bound, by which the best epoch is chosen.
    """

    epoch: int
    time: float  # unix seconds at its end
    seconds: float
    images_per_s: float
    learning_rate: float
    beta: float
    train_elbo: float
    train_log_px_z: float
    train_kl: float
    valid_elbo: float
    valid_log_px_z: float
    valid_kl: float
    valid_bound: float
    is_best: bool

    def to_row(self) -> dict[str, float | int | bool]:
        return asdict(self)


@dataclass
class TrainingState:
    """All that training needs to go on; `fit` keeps it current at each yield.

    `optimizer` maps "<parameter>/<slot>" to the optimiser's tensors (references, not copies).
    """

    epoch: int = 0
    best_bound: float = -math.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    history: list[EpochStats] = field(default_factory=list)

    def finished(self, config: TrainingConfig) -> bool:
        """Whether all epochs are done or patience has run out."""
        out_of_patience = (
            config.patience is not None and self.epoch - self.best_epoch >= config.patience
        )
        return self.epoch >= config.epochs or out_of_patience


class DivergenceError(ArithmeticError):
    """The loss stopped being a finite number; training can't go on from here."""

    def __init__(self, epoch: int, step: int, term: str) -> None:
        super().__init__(
            f"training diverged in epoch {epoch}, step {step}: {term} is not finite; a smaller "
            "training.learning_rate, a training.gradient_clip or a larger model.min_scale may help"
        )
        self.epoch, self.step, self.term = epoch, step, term

    def __reduce__(self) -> tuple[type[DivergenceError], tuple[int, int, str]]:
        return DivergenceError, (self.epoch, self.step, self.term)
