"""The training loop: `fit` yields one `EpochStats` an epoch; its caller reports and checkpoints.

The same loop runs in a bare process, in Ray Train workers and in Ray Tune trials: where
torch.distributed is initialised with more than one rank, each takes its share of every global batch
and their gradients are summed, by DistributedDataParallel on GPUs and by `vae.fast.ranks` on CPUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vae import acceleration
from vae.data import Batch, NoiseShape, Source
from vae.models import VAE
from vae.objectives import Objective, ObjectiveTerms, TrainingModule
from vae.optimizers import OPTIMIZERS
from vae.parallel import Ranks, SummingRanks
from vae.system import keep_freed_memory
from vae.training.config import TrainingConfig
from vae.training.state import DivergenceError, EpochStats, TrainingState

if TYPE_CHECKING:
    from vae.acceleration import GraphedSteps

DDP_DEVICES = ("cuda",)


def fit(
    model: VAE,
    data: Source,
    config: TrainingConfig,
    state: TrainingState | None = None,
    *,
    objective: Objective | None = None,
    fast: bool = True,
) -> Iterator[EpochStats]:
    """Train `model` in place and yield after each epoch, starting behind `state`'s last one.

    At each yield `model` holds the current weights and `state` all that a checkpoint needs;
    `state.best_weights` are those of the epoch with the highest validation bound. Killed and
    resumed at the same world size, the weights are bit-identical on CPU (more than two ranks, or
    with `gradient_clip`: on one machine both times, or on several). Ranks on CPUs of one machine
    may share the memory of their weights and of the optimiser's state until `fit` ends: who changes
    them at a yield changes all ranks'. After an error of another kind than the one below the
    weights may be between two steps: go on from a checkpoint. fast: whether fast paths may be
    taken (`vae.fast`), to the same numbers but for rounding.

    Raises DivergenceError, on every rank at the same step, when the loss is not finite; the weights
    are then still those before that step. Also in place of the last epoch, when no epoch had a
    finite validation bound.
    """
    keep_freed_memory()
    state = TrainingState() if state is None else state
    trainer = Trainer(model, data, config, objective or Objective(), state, fast)
    try:
        while not state.finished(config):
            stats = trainer.epoch()
            if state.finished(config) and not state.best_weights:
                raise DivergenceError(stats.epoch, trainer.steps_per_epoch, "the validation bound")
            yield stats
    finally:
        trainer.close()


class Trainer:
    """The parts of one `fit`: module, optimiser and ranks."""

    def __init__(
        self,
        model: VAE,
        data: Source,
        config: TrainingConfig,
        objective: Objective,
        state: TrainingState,
        fast: bool = True,
    ) -> None:
        self.model, self.config, self.objective, self.state = model, config, objective, state
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.data = data.to(self.device)
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.module = TrainingModule(model, objective)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.parallel: nn.Module = self.module
        self.uses_ddp = self.world_size > 1 and self.device.type in DDP_DEVICES
        if self.uses_ddp:
            self.parallel = DistributedDataParallel(
                self.module, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        self.optimizer = OPTIMIZERS[config.optimizer](
            named, weight_decay=config.weight_decay, tensors=state.optimizer
        )
        self.learning_rate = config.learning_rate
        self.fast = fast
        self.graphed: GraphedSteps | None = None
        if self.world_size == 1:
            with acceleration.allowed(fast):
                self.graphed = acceleration.graphed_steps(
                    model, self.gradient, self.update, self.parameters, config.batch_size
                )
        self.noise = NoiseShape(
            objective.num_samples,
            model.noise_dim,
            model.dequantizes,
            self.dtype,
            objective.num_drawn is not None,
        )
        self.steps_per_epoch = -(-self.data.num_train // config.batch_size)
        self.manual: list[Tensor] = []
        self.ranks = Ranks(named)
        if self.world_size > 1 and not self.uses_ddp:
            with acceleration.allowed(fast):
                self.ranks = join_ranks(model, named, self.optimizer.tensors)

    def _manual_parameters(self) -> list[Tensor]:
        """Those whose gradient needs no autograd; none: autograd takes all.

        Asked once an epoch: at small batches it costs a twentieth of a step.
        """
        batch_size = min(self.config.batch_size, self.data.num_train)
        if self.uses_ddp or not self.module.has_manual_backward(batch_size):
            return []
        return self.module.manual_parameters()

    @property
    def stepper(self) -> Trainer | GraphedSteps:
        return self.graphed or self

    def close(self) -> None:
        """Let go of the memory that all ranks share, and of that of the graphs."""
        self.graphed = None
        self.ranks.close(self.optimizer.tensors)

    def epoch(self) -> EpochStats:
        with acceleration.allowed(self.fast), self.model.products_in(self.config.precision):
            return self._epoch()

    def _epoch(self) -> EpochStats:
        start, epoch = time.perf_counter(), self.state.epoch + 1
        beta = self.objective.beta_at(epoch)
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        batches = self.train_batches(epoch)
        self.module.train()
        self.ranks.begin_epoch()
        self.manual = self._manual_parameters()
        batch, step = next(batches, None), 0
        while batch is not None:
            gradient = self.stepper.gradient(batch, beta)
            batch = next(batches, None)  # drawn while a GPU computes
            totals += self._update_by(gradient, epoch, step)
            step += 1
        train = self._reduce(totals)
        train_seconds = time.perf_counter() - start
        valid = self.validate()
        is_best = valid["bound"] > self.state.best_bound
        stats = EpochStats(
            epoch=epoch,
            time=time.time(),
            seconds=time.perf_counter() - start,
            images_per_s=self.data.num_train / train_seconds,
            learning_rate=self.learning_rate,
            beta=beta,
            train_elbo=train["log_px_z"] - train["kl"],
            train_log_px_z=train["log_px_z"],
            train_kl=train["kl"],
            valid_elbo=valid["log_px_z"] - valid["kl"],
            valid_log_px_z=valid["log_px_z"],
            valid_kl=valid["kl"],
            valid_bound=valid["bound"],
            is_best=is_best,
        )
        self._advance(stats)
        return stats

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        """This rank's share of each global batch of an epoch."""
        return self.data.train_batches(
            self.noise,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
        )

    def train_step(self, batch: Batch, epoch: int, step: int, beta: float) -> Tensor:
        """One step of the optimiser; returns the sums of (count, log_px_z, kl, bound).

        They hold until the next step: a graph writes to the same place.
        """
        return self._update_by(self.stepper.gradient(batch, beta), epoch, step)

    def _update_by(self, gradient: tuple[Tensor, ...], epoch: int, step: int) -> Tensor:
        loss, finite, sums = gradient
        if not math.isfinite(finite.item()):
            self._stop(loss, sums, epoch, step)
        self.learning_rate = self._learning_rate(epoch, step)
        self.stepper.update(self.learning_rate)
        return sums

    def gradient(self, batch: Batch, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Leave its gradient, clipped, in each parameter's `.grad` that this rank is to update.

        Returns the loss; a number that is finite if the loss and all gradients to be clipped are,
        of several ranks on all or on none: by the sum of their losses, or with DDP, which sums no
        losses, by that of their gradients; and the sums of (count, log_px_z, kl, bound).
        """
        # DDP averages gradients over ranks: times world_size it is the sum over all examples.
        scale = self.world_size if self.uses_ddp else 1
        if self.objective.reduction == "mean":
            scale /= batch.global_size
        self.optimizer.zero_grad()
        if self.manual:
            self.ranks.lend_gradients(self.manual)
            terms = self.module.manual_backward(batch.x, batch.eps, float(beta), scale)
            loss = terms.surrogate.sum() * -scale
        else:
            terms = self.parallel(batch.x, batch.eps, batch.u, beta, batch.v)
            loss = terms.surrogate.sum() * -scale
            loss.backward()
        loss = self.ranks.sum(loss)
        clip, finite = self.config.gradient_clip, loss
        if clip is not None or self.uses_ddp:
            norm = self.ranks.norm()
            if clip is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
            finite = norm if self.uses_ddp else norm + loss
        return loss, finite, _sums(terms)

    def update(self, learning_rate: float | Tensor) -> None:
        self.optimizer.step(learning_rate)
        self.ranks.end_update()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over the whole validation split, over all ranks."""
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        batches = self.data.valid_batches(
            self.noise._replace(dequantize=False, resample=False),
            seed=self.config.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        self.module.eval()
        for batch in batches:
            totals += _sums(self.module(batch.x, batch.eps, None, self.objective.beta))
        return self._reduce(totals)

    def _learning_rate(self, epoch: int, step: int) -> float:
        if self.config.schedule == "constant":
            return self.config.learning_rate
        done = (epoch - 1) * self.steps_per_epoch + step
        # A stream split over workers may need a step more.
        share = min(1.0, done / (self.config.epochs * self.steps_per_epoch))
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def _stop(self, loss: Tensor, sums: Tensor, epoch: int, step: int) -> NoReturn:
        names = ("log p(x|z)", "KL", "the objective")
        terms = [
            name
            for name, value in zip(names, sums[1:].tolist(), strict=True)
            if not math.isfinite(value)
        ]
        elsewhere = "the gradient" if math.isfinite(loss.item()) else "the objective"
        raise DivergenceError(epoch, step + 1, terms[0] if terms else elsewhere)

    def _reduce(self, totals: Tensor) -> dict[str, float]:
        """Sums over all ranks → means over all examples."""
        if self.world_size > 1:
            dist.all_reduce(totals)
        count, *sums = totals.tolist()
        return {
            name: value / count
            for name, value in zip(("log_px_z", "kl", "bound"), sums, strict=True)
        }

    def _advance(self, stats: EpochStats) -> None:
        state = self.state
        state.epoch = stats.epoch
        state.history.append(stats)
        state.optimizer = self.optimizer.tensors
        if stats.is_best:
            state.best_bound, state.best_epoch = stats.valid_bound, stats.epoch
            state.best_weights = {
                name: value.detach().clone() for name, value in self.model.state_dict().items()
            }


def join_ranks(
    model: nn.Module, parameters: Mapping[str, Tensor], state: dict[str, Tensor]
) -> Ranks:
    """Give all ranks the weights of rank 0; returns how they train on together.

    parameters: by name, those that are trained; state: the optimiser's, the same on all ranks,
    whose tensors may be replaced. All ranks take part.
    """
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    return acceleration.sharing_ranks(parameters, state) or SummingRanks(parameters)


def _sums(terms: ObjectiveTerms) -> Tensor:
    """(count, Σ log_px_z, Σ kl, Σ bound), float64."""
    values = torch.stack([terms.log_px_z, terms.kl, terms.bound])
    sums = values.sum(1, dtype=torch.float64)
    return torch.cat([sums.new_full((1,), values.shape[1]), sums])
