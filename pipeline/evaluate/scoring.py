"""log p(x) of a split, example by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from vae.evidence import EvidenceSettings, example_generators, importance_sampling
from vae.models import VAE, kl_divergence

BOUND_SAMPLES = 100  # of the encoder's posterior, for the ELBO's terms


@dataclass(frozen=True, kw_only=True)
class SplitEvidence:
    """Evidence for a whole split: float64 arrays (N,); `ladder` is {K: (N,)}.

    log_px, se, ess, khat, samples (K) and ladder are of the proposal, `proposal_elbo` is its own
    bound; elbo, log_px_z and kl are the encoder's.
    """

    log_px: np.ndarray
    se: np.ndarray
    ess: np.ndarray
    khat: np.ndarray
    samples: np.ndarray
    proposal_elbo: np.ndarray
    elbo: np.ndarray
    log_px_z: np.ndarray
    kl: np.ndarray
    ladder: dict[int, np.ndarray]

    def only(self, chosen: np.ndarray) -> SplitEvidence:
        """The same of some examples. chosen: (N,) bool."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ladder"}
        ladder = {k: values[chosen] for k, values in self.ladder.items()}
        return SplitEvidence(**{k: v[chosen] for k, v in columns.items()}, ladder=ladder)


def score_split(
    model: VAE,
    x: Tensor,
    settings: EvidenceSettings,
    done: Callable[[int], None] | None = None,
) -> SplitEvidence:
    """Importance-sampled log p(x) and the ELBO's terms for every example of a split.

    Args:
        model: in evaluation mode.
        x: (N, *data_shape), in data units.
        settings: of the estimates, as the served model has them.
        done: told after each batch how many examples are behind it.

    The ELBO's terms are means over min(K, 100) samples of the encoder's posterior; the KL is
    exact where it has a closed form.
    """
    rows: list[dict[str, Tensor]] = []
    ladders: list[dict[int, Tensor]] = []
    samples = min(settings.num_samples, BOUND_SAMPLES)
    for part, found in settings.estimates(model, x):
        noise = example_generators(part, settings.seed)
        bound = importance_sampling(
            model, part, samples, generator=noise, precision=settings.precision
        )
        with torch.inference_mode():
            closed = kl_divergence(model.posterior(part), model.prior())
        kl = bound.kl if closed is None else closed
        row = {name: getattr(found, name) for name in ("log_px", "se", "ess", "khat", "samples")}
        row["proposal_elbo"] = found.elbo
        rows.append(row | {"log_px_z": bound.log_px_z, "kl": kl, "elbo": bound.log_px_z - kl})
        ladders.append(found.ladder)
        if done is not None:
            done(sum(len(row["kl"]) for row in rows))
    columns = {name: _joined([row[name] for row in rows]) for name in rows[0]}
    return SplitEvidence(
        **columns, ladder={k: _joined([ladder[k] for ladder in ladders]) for k in ladders[0]}
    )


def _joined(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).double().cpu().numpy()
