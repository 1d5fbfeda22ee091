"""How log p(x) is estimated: one object that goes whole from the evaluation to the served model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what only carries settings needs no torch
    from torch import Tensor

    from vae.evidence.weights import Evidence
    from vae.models import VAE

BATCH_VALUES = {"cpu": 2**17, "cuda": 2**18}
"""Data values in a batch, whose decoder outputs come in chunks."""

MOST_EXAMPLES = 1024  # in a batch


@dataclass(frozen=True, kw_only=True)
class EvidenceSettings:
    """All that an estimate depends on besides the model and the example.

    num_samples: K; the most with target_se. seed: of the noise; each example's is its own.
    proposal, target_se, precision: as in `importance_sampling`.
    """

    num_samples: int
    seed: int = 0
    proposal: str = "encoder"
    target_se: float | None = None
    precision: str = "fp32"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> EvidenceSettings:
        """Of a mapping that holds them beside others, as metrics.json and reference.json do."""
        known = {field.name for field in fields(cls)} & set(content)
        return cls(**{name: content[name] for name in known})

    def estimate(self, model: VAE, x: Tensor) -> Evidence:
        """Evidence for one batch x (B, *data_shape)."""
        from vae.evidence.estimators import importance_sampling
        from vae.evidence.noise import example_generators

        return importance_sampling(
            model,
            x,
            self.num_samples,
            generator=example_generators(x, self.seed),
            proposal=self.proposal,
            target_se=self.target_se,
            precision=self.precision,
        )

    def estimates(self, model: VAE, x: Tensor) -> Iterator[tuple[Tensor, Evidence]]:
        """Batches of x (N, *data_shape), on the model's device, each with its `estimate`.

        An example's estimate does not depend on its batch, but for rounding.
        """
        device = next(model.parameters()).device
        values = BATCH_VALUES.get(device.type, BATCH_VALUES["cpu"])
        for part in x.split(max(1, min(MOST_EXAMPLES, values // max(1, x[0].numel())))):
            part = part.to(device)
            yield part, self.estimate(model, part)

    def log_px(self, model: VAE, x: Tensor) -> Tensor:
        """log p(x) of every example, (N,), float64, on the CPU."""
        import torch

        parts = [found.log_px.double().cpu() for _, found in self.estimates(model, x)]
        return torch.cat(parts)
