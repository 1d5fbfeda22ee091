"""The selfcheck stage: it passes as it stands, and each known way to be wrong fails it by name."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import selfcheck as stage
from pipeline.stage import UserError
from vae.evidence import importance_sampling


@pytest.fixture(autouse=True)
def few_dimensions(monkeypatch):
    monkeypatch.setattr(stage, "LATENT_DIMS", (2, 8))


def failed(checks):
    return [check.name for check in checks if not check.passed]


def test_it_passes_and_repeats_itself():
    checks = stage.selfcheck()
    assert failed(checks) == []
    assert len(checks) == 2 * 7
    assert stage.selfcheck() == checks
    assert stage.selfcheck(seed=100) != checks


@pytest.mark.slow
def test_it_passes_for_other_seeds(monkeypatch):
    monkeypatch.setattr(stage, "LATENT_DIMS", (2, 8, 32))
    for seed in range(1000, 1100, 20):
        assert failed(stage.selfcheck(seed=seed)) == []


def broken(change):
    """An estimator with one defect."""

    def estimator(model, x, num_samples, *, generator=None, chunk_size=None):
        evidence = importance_sampling(model, x, num_samples, generator=generator)
        return replace(evidence, **change(evidence, num_samples))

    return estimator


DEFECTS = {
    "200 of 250 used": (
        lambda e, K: {"log_px": e.log_px + math.log(200 / 250)},
        "exact posterior: error of log p(x)",
    ),
    "the sign turned round": (
        lambda e, K: {"log_px": -e.log_px},
        "exact posterior: error of log p(x)",
    ),
    "constants left out": (
        lambda e, K: {"log_px": e.log_px + 2, "elbo": e.elbo + 2},
        "exact posterior: log p(x) - ELBO",
    ),
    "the bound taken for log p(x)": (
        lambda e, K: {"log_px": e.elbo},
        "shifted and widened: error of log p(x) in standard errors",
    ),
    "the estimate taken for the bound": (
        lambda e, K: {"elbo": e.log_px},
        "shifted and widened: mean of log p(x) - ELBO",
    ),
    "errors ten times too small": (
        lambda e, K: {"se": e.se / 10},
        "shifted and widened: error of log p(x) in standard errors",
    ),
    "not a number": (
        lambda e, K: {"log_px": e.log_px * math.nan},
        "shifted and widened: error of log p(x) in standard errors",
    ),
    "khat that never warns": (
        lambda e, K: {"khat": torch.zeros_like(e.khat)},
        "too narrow: median khat",
    ),
    "khat that always warns": (
        lambda e, K: {"khat": torch.ones_like(e.khat)},
        "shifted and widened: largest khat",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_found_by_name(defect, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "LATENT_DIMS", (8,))
    change, name = DEFECTS[defect]
    checks = stage.selfcheck(estimator=broken(change))
    assert any(name in check for check in failed(checks))
    out = tmp_path / "selfcheck.json"
    with pytest.raises(UserError, match=r"self-checks failed") as error:
        stage.write_report(checks, out)
    assert name in str(error.value)
    report = json.loads(out.read_text())
    assert report["passed"] is False
    assert [c["name"] for c in report["checks"] if not c["passed"]] == failed(checks)


def test_the_stage_writes_its_report(tmp_path, monkeypatch, capsys):
    out = tmp_path / "reports" / "selfcheck.json"
    monkeypatch.chdir(Path(__file__).parents[2])  # where params.yaml is
    monkeypatch.setattr("sys.argv", ["selfcheck", "--out", str(out)])
    stage.main()
    report = json.loads(out.read_text())
    assert report["passed"] is True
    assert set(report["checks"][0]) == {"name", "expected", "found", "tolerance", "passed"}
    assert "14 checks" in capsys.readouterr().out
