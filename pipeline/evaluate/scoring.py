"""log p(x) of a split, example by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vae.evidence import example_generators, importance_sampling
from vae.models import VAE, kl_divergence

BATCH_VALUES = {"cpu": 2**17, "cuda": 2**18}  # in a batch, whose decoder outputs come in chunks


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
    num_samples: int,
    seed: int,
    proposal: str = "encoder",
    target_se: float | None = None,
    precision: str = "fp32",
    done: Callable[[int], None] | None = None,
) -> SplitEvidence:
    """Importance-sampled log p(x) and the ELBO's terms for every example of a split.

    Args:
        model: in evaluation mode.
        x: (N, *data_shape), in data units.
        num_samples: K; the most with target_se.
        seed: of the importance samples; each example's noise is its own, as in the served model.
        proposal: a name in `vae.evidence.proposals`.
        target_se, precision: as in `vae.evidence.importance_sampling`.
        done: told after each batch how many examples are behind it.

    The ELBO's terms are means over min(K, 100) samples of the encoder's posterior; the KL is
    exact where it has a closed form.
    """
    device = next(model.parameters()).device
    sample = partial(importance_sampling, model, precision=precision)
    rows: list[dict[str, Tensor]] = []
    ladders: list[dict[int, Tensor]] = []
    values = BATCH_VALUES.get(device.type, BATCH_VALUES["cpu"])
    for part in x.split(max(1, min(1024, values // max(1, x[0].numel())))):
        part = part.to(device)
        noise = example_generators(part, seed)
        found = sample(part, num_samples, generator=noise, proposal=proposal, target_se=target_se)
        bound = sample(part, min(num_samples, BOUND_SAMPLES), generator=noise)
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
