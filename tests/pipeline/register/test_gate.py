"""The gate's decisions, case by case, and the paired gain against scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from pipeline.register import Comparison, Situation, decide, paired_gain

CLEAR = Comparison(gain=1.0, gain_se=0.4, num_examples=100)
UNCLEAR = Comparison(gain=1.0, gain_se=0.6, num_examples=100)
WORSE = Comparison(gain=-1.0, gain_se=0.1, num_examples=100)


def test_the_paired_gain_is_scipys_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    old = rng.normal(-100, 30, 50)
    new = old + rng.normal(0.5, 1, 50)
    names = [f"i{n}" for n in range(50)]
    found = paired_gain(dict(zip(names, new, strict=True)), dict(zip(names, old, strict=True)))
    statistic = scipy.stats.ttest_rel(new, old).statistic
    assert found.gain == pytest.approx((new - old).mean(), rel=1e-12)
    assert found.gain / found.gain_se == pytest.approx(statistic, rel=1e-12)
    assert found.num_examples == 50


def test_pairs_are_by_id_and_without_what_the_champion_saw() -> None:
    challenger = {"a": 3.0, "b": 5.0, "c": 100.0, "new": 7.0}
    champion = {"c": 0.0, "b": 1.0, "a": 1.0, "old": 0.0}
    found = paired_gain(challenger, champion, leave_out=["c"])
    assert (found.gain, found.num_examples) == (3.0, 2)
    assert found.gain_se == pytest.approx(np.std([2, 4], ddof=1) / np.sqrt(2))
    with pytest.raises(ValueError, match="1 test examples are left"):
        paired_gain(challenger, champion, leave_out=["c", "b"])


def situation(**changes: Any) -> Situation:
    defaults: dict[str, Any] = {"version": 2, "champion": 1, "khat_bad_fraction": 0.1}
    if "not_comparable" not in changes:
        defaults["comparison"] = CLEAR
    return Situation(**defaults | changes)


@pytest.mark.parametrize(
    ("changes", "alias", "verdict", "reason"),
    [
        ({"champion": None}, "champion", "champion", "it is the first: there was no champion"),
        ({}, "champion", "champion", "more than 2 standard errors"),
        ({"comparison": UNCLEAR}, "challenger", "challenger", "not more than 2 standard errors"),
        ({"comparison": WORSE}, "challenger", "challenger", "not more than 2 standard errors"),
        ({"khat_bad_fraction": 0.11}, "challenger", "challenger", "khat exceeds 0.7 on 11.0%"),
        ({"khat_bad_fraction": None}, "challenger", "challenger", "too few importance samples"),
        ({"champion": None, "khat_bad_fraction": 0.2}, "challenger", "challenger", "khat"),
        ({"not_comparable": "other"}, "challenger", "not comparable", "version 1: other"),
        ({"champion": 2, "comparison": None}, "champion", "champion", "it is the champion"),
        ({"promote": False}, "challenger", "challenger", "register.promote: false"),
        ({"promote": False, "champion": None}, "challenger", "challenger", "promote: false"),
        ({"promote": True, "comparison": WORSE}, "champion", "champion", "register.promote: true"),
        ({"promote": True, "not_comparable": "x"}, "champion", "champion", "promote: true"),
        ({"experiment": "e1"}, "challenger", "challenger", "experiment e1"),
        ({"experiment": "e1", "champion": None}, "challenger", "challenger", "experiment e1"),
        ({"experiment": "e1", "promote": True}, "champion", "champion", "promote: true"),
        ({"taken_back": "rolled back"}, "challenger", "challenger", "rolled back; `make promote"),
        ({"taken_back": "rolled back", "promote": True}, "challenger", "challenger", "rolled"),
    ],
)
def test_decisions(changes: dict[str, Any], alias: str, verdict: str, reason: str) -> None:
    found = decide(situation(**changes))
    assert (found.alias, found.verdict) == (alias, verdict)
    assert reason in "; ".join(found.reasons)


def test_two_standard_errors_exactly_are_not_enough() -> None:
    assert not Comparison(gain=2.0, gain_se=1.0, num_examples=9).significant
    assert Comparison(gain=2.001, gain_se=1.0, num_examples=9).significant


def test_an_example_that_only_the_champion_scores_shuts_the_gate() -> None:
    champion = {str(i): -10.0 + 0.01 * i for i in range(10)}
    challenger = {key: value + 5 for key, value in champion.items()} | {"3": -math.inf}
    found = paired_gain(challenger, champion | {"4": math.nan})
    assert (found.num_examples, found.num_lost) == (8, 1)
    assert found.gain == pytest.approx(5)
    decision = decide(
        Situation(version=2, champion=1, khat_bad_fraction=0.0, comparison=found, num_unscored=1)
    )
    assert decision.alias == "challenger"
    assert "1 test examples have no log p(x), and are in no mean" in decision.reasons
    assert any("gives no log p(x) to 1 test examples" in reason for reason in decision.reasons)
