"""The gate: who is champion, by a significant paired gain in test log p(x), and why.

Pure decisions on figures: no registry, no files. All log-likelihoods in nats.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from vae.trust import KHAT_LIMIT

CHAMPION, CHALLENGER = "champion", "challenger"
STANDARD_ERRORS = 2.0
MOST_BAD_KHAT = 0.10  # share of the examples whose khat may exceed KHAT_LIMIT


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The challenger's paired mean gain over the champion on the same examples, in nats.

    num_left_out: test examples that the champion was trained or selected on. num_lost: those that
    the champion gives a log p(x) and the challenger does not.
    """

    gain: float
    gain_se: float
    num_examples: int
    num_left_out: int = 0
    num_lost: int = 0

    @property
    def significant(self) -> bool:
        """Whether the gain exceeds two of its standard errors."""
        return self.gain > STANDARD_ERRORS * self.gain_se


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that the gate looks at."""

    version: int
    champion: int | None  # None: there is none yet
    khat_bad_fraction: float | None  # None: too few samples for any khat
    num_unscored: int = 0  # test examples without a log p(x)
    comparison: Comparison | None = None
    not_comparable: str | None = None  # why a comparison with the champion makes no sense
    promote: bool | None = None  # params register.promote
    experiment: str | None = None  # name of the DVC experiment that this runs in
    taken_back: str | None = None  # how a person took the alias from this very version
    promoted_for: tuple[str, ...] = ()  # on record: why this very version became champion


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The alias that the version gets, the verdict in a word or two, and the reasons for people.

    gate: whether the figures alone would have let it pass.
    """

    alias: str
    verdict: str
    reasons: tuple[str, ...]
    gate: bool


def paired_gain(
    challenger: Mapping[str, float], champion: Mapping[str, float], leave_out: Collection[str] = ()
) -> Comparison:
    """Mean and standard error of the difference in log p(x) on the examples that both scored.

    An example without a finite log p(x) is not scored. leave_out: examples that the champion was
    trained or selected on.
    Raises ValueError with fewer than two examples, which have no standard error.
    """
    left_out = set(leave_out)
    both = [key for key in challenger if key in champion and key not in left_out]
    theirs = [key for key in both if math.isfinite(champion[key])]
    shared = [key for key in theirs if math.isfinite(challenger[key])]
    if len(shared) < 2:
        raise ValueError(f"{len(shared)} test examples are left to compare the two models on")
    gains = np.array([challenger[key] - champion[key] for key in shared], dtype=np.float64)
    return Comparison(
        gain=float(gains.mean()),
        gain_se=float(gains.std(ddof=1) / math.sqrt(len(gains))),
        num_examples=len(gains),
        num_left_out=len(left_out & set(challenger)),
        num_lost=len(theirs) - len(shared),
    )


def decide(case: Situation) -> Decision:
    """Champion or challenger, and the reasons.

    `register.promote: true` and a person's earlier word come before the gate; the gate is: no
    champion yet, or a comparable one that is beaten by more than two standard errors; with khat
    above 0.7 on at most 10% of the examples, since otherwise log p(x) can't be trusted.
    """
    gate, reasons = _gate(case)
    if case.champion == case.version:
        words = case.promoted_for or ("it is the champion", *reasons)
        return Decision(alias=CHAMPION, verdict=CHAMPION, reasons=words, gate=gate)
    if case.promote is True and case.taken_back is None:
        words = ("promoted by register.promote: true", *reasons)
        return Decision(alias=CHAMPION, verdict=CHAMPION, reasons=words, gate=gate)
    forbidden = None
    if case.taken_back is not None:
        forbidden = f"{case.taken_back}; `make promote VERSION={case.version}` gives it the alias"
    elif case.promote is False:
        forbidden = "register.promote: false leaves the champion as it is"
    elif case.experiment is not None:
        forbidden = (
            f"experiment {case.experiment} registers as challenger only "
            "(register.promote=true promotes it)"
        )
    if forbidden is not None:
        return Decision(
            alias=CHALLENGER, verdict=CHALLENGER, reasons=(forbidden, *reasons), gate=gate
        )
    if gate:
        return Decision(alias=CHAMPION, verdict=CHAMPION, reasons=tuple(reasons), gate=gate)
    verdict = "not comparable" if case.not_comparable else CHALLENGER
    return Decision(alias=CHALLENGER, verdict=verdict, reasons=tuple(reasons), gate=gate)


def _gate(case: Situation) -> tuple[bool, list[str]]:
    """Whether the figures allow the promotion, and what they say."""
    allowed, reasons = True, []
    if case.khat_bad_fraction is None:
        allowed = False
        reasons.append(
            "too few importance samples to judge them by khat; "
            "raise evaluate.num_importance_samples"
        )
    elif case.khat_bad_fraction > MOST_BAD_KHAT:
        allowed = False
        reasons.append(
            f"khat exceeds {KHAT_LIMIT:g} on {case.khat_bad_fraction:.1%} of the examples, more "
            f"than {MOST_BAD_KHAT:.0%}: its log p(x) can't be trusted; "
            "a higher evaluate.num_importance_samples or a richer model.posterior may help"
        )
    if case.num_unscored:
        reasons.append(f"{case.num_unscored} test examples have no log p(x), and are in no mean")
    if case.champion is None:
        reasons.append("it is the first: there was no champion")
    elif case.champion == case.version:
        pass
    elif case.not_comparable is not None:
        allowed = False
        words = f"not comparable with champion version {case.champion}"
        reasons.append(f"{words}: {case.not_comparable}")
    else:
        assert case.comparison is not None
        allowed = allowed and case.comparison.significant
        if case.comparison.num_lost:
            allowed = False
            reasons.append(
                f"it gives no log p(x) to {case.comparison.num_lost} test examples to which "
                f"champion version {case.champion} gives one"
            )
        reasons.append(gain_sentence(case.comparison, case.champion))
    return allowed, reasons


def gain_sentence(comparison: Comparison, champion: int) -> str:
    """The comparison in words, with its figures."""
    sign = "more" if comparison.significant else "not more"
    pairs = f"{comparison.num_examples} pairs"
    if comparison.num_left_out:
        pairs += f", without {comparison.num_left_out} that it was trained or selected on"
    return (
        f"{comparison.gain:+.3f} ± {comparison.gain_se:.3f} nats a test example over champion "
        f"version {champion} ({pairs}): {sign} than {STANDARD_ERRORS:g} standard errors"
    )
