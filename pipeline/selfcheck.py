"""Selfcheck stage: the estimators of log p(x) against exact answers, before anything is trained.

Reads nothing but params.yaml, to refuse a faulty one; writes reports/selfcheck.json. On
linear-Gaussian models, whose log p(x) and posterior are known, importance sampling must be exact
with the exact posterior as proposal, within its own error with a shifted and widened one, and must
say so itself when the proposal is too narrow. A check that fails stops the pipeline.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.params import load_params
from pipeline.stage import UserError, run_stage, say, write_json
from vae.evidence import Evidence, FactorAnalysis, importance_sampling
from vae.trust import KHAT_LIMIT

LATENT_DIMS = (2, 8, 32)
NUM_EXAMPLES = 16
NUM_SAMPLES = 5_000
SHIFT, WIDEN = 0.1, 1.2  # the imperfect proposal, in posterior standard deviations
NARROW = 0.3
ROUNDING = 1e-8  # nats, for what must be exact in float64
STANDARD_ERRORS = 4.0
MIN_ESS = 200.0
MAX_KHAT = 0.5

Estimator = Callable[..., Evidence]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison: `found` must lie within `tolerance` of `expected`, or beyond it on the side
    that `name` says."""

    name: str
    expected: float
    found: float | None  # None: not a finite number
    tolerance: float
    passed: bool


def selfcheck(*, seed: int = 0, estimator: Estimator = importance_sampling) -> list[Check]:
    """Every check, for each latent dimension; the same seed gives the same figures.

    Args:
        seed: of the models, their data and the samples.
        estimator: what is checked, called as `importance_sampling` is.
    """
    checks: list[Check] = []
    for latent_dim in LATENT_DIMS:
        generator = torch.Generator().manual_seed(seed + latent_dim)
        model = _random_model(latent_dim, generator)
        x, _ = model.sample(NUM_EXAMPLES, generator=generator)
        checks += _check_model(model, x, estimator, generator)
    return checks


def _check_model(
    model: FactorAnalysis, x: Tensor, estimator: Estimator, generator: torch.Generator
) -> Iterable[Check]:
    d = model.latent_dim
    exact = model.log_prob(x)

    def estimate(num_samples: int, shift: float = 0.0, widen: float = 1.0) -> Evidence:
        vae = model.as_vae(shift=shift, widen=widen)
        return estimator(vae, x, num_samples, generator=generator)

    best = estimate(100)
    yield _near(f"d={d}, exact posterior: error of log p(x)", best.log_px - exact, ROUNDING)
    yield _near(f"d={d}, exact posterior: log p(x) - ELBO", exact - best.elbo, ROUNDING)

    off = estimate(NUM_SAMPLES, SHIFT, WIDEN)
    yield _near(
        f"d={d}, shifted and widened: error of log p(x) in standard errors",
        (off.log_px - exact) / off.se,
        STANDARD_ERRORS,
    )
    # log w is a quadratic form in the noise, with this variance for every x.
    variance = d * (0.5 * (1 - WIDEN**2) ** 2 + (WIDEN * SHIFT) ** 2)
    yield _near(
        f"d={d}, shifted and widened: mean of log p(x) - ELBO, against KL(q || posterior)",
        (exact - off.elbo).mean(),
        STANDARD_ERRORS * math.sqrt(variance / (NUM_SAMPLES * len(x))),
        expected=model.proposal_kl(SHIFT, WIDEN),
    )
    yield _above(f"d={d}, shifted and widened: smallest ESS, at least", off.ess.min(), MIN_ESS)
    yield _below(f"d={d}, shifted and widened: largest khat, below", off.khat.max(), MAX_KHAT)

    narrow = estimate(NUM_SAMPLES, widen=NARROW)
    yield _above(f"d={d}, too narrow: median khat, above", narrow.khat.median(), KHAT_LIMIT)


def _random_model(latent_dim: int, generator: torch.Generator) -> FactorAnalysis:
    """A linear-Gaussian model of 2 d + 8 values, about half of whose variance is noise."""
    num_values = 2 * latent_dim + 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight = normal(num_values, latent_dim) / math.sqrt(latent_dim)
    return FactorAnalysis(normal(num_values), weight, 0.2 + normal(num_values).square())


def _near(name: str, found: Tensor, tolerance: float, expected: float = 0.0) -> Check:
    """The furthest of `found` from `expected`."""
    found = found.reshape(-1)
    worst = found[(found - expected).abs().nan_to_num(nan=math.inf).argmax()].item()
    passed = abs(worst - expected) <= tolerance
    return _check(name, expected, worst, tolerance, passed)


def _above(name: str, found: Tensor, limit: float) -> Check:
    return _check(name, limit, found.item(), 0.0, found.item() >= limit)


def _below(name: str, found: Tensor, limit: float) -> Check:
    return _check(name, limit, found.item(), 0.0, found.item() < limit)


def _check(name: str, expected: float, found: float, tolerance: float, passed: bool) -> Check:
    shown = found if math.isfinite(found) else None
    return Check(name=name, expected=expected, found=shown, tolerance=tolerance, passed=passed)


def write_report(checks: list[Check], out: Path) -> None:
    """Write selfcheck.json, passed or not.

    Raises:
        UserError: naming every check that failed.
    """
    failed = [check for check in checks if not check.passed]
    write_json(out, {"passed": not failed, "checks": [asdict(check) for check in checks]})
    if failed:
        lines = [
            f"  {check.name} {check.expected:g} (tolerance {check.tolerance:g}); "
            f"found {'no finite number' if check.found is None else format(check.found, 'g')}"
            for check in failed
        ]
        raise UserError(
            f"{len(failed)} of {len(checks)} self-checks failed, so no log p(x) could be trusted. "
            "Look for a changed file in vae/ (evidence.py, importance_weights.py, model.py):\n"
            + "\n".join(lines)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--selfcheck", "--out", type=Path, default=Path("reports/selfcheck.json"))
    paths = parser.parse_args()
    load_params()
    checks = selfcheck()
    write_report(checks, paths.selfcheck)
    say(
        f"selfcheck  {len(checks)} checks of importance sampling against exact log p(x) passed "
        f"(d = {', '.join(map(str, LATENT_DIMS))}, K = {NUM_SAMPLES:,})"
    )


if __name__ == "__main__":
    run_stage(main)
