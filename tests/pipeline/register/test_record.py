"""What a version says of itself is one measurement, told alike by tags, page and register.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.register import (
    EVIDENCE_KEYS,
    LONGEST_PAGE,
    TAGS,
    Registry,
    is_stale,
    is_weaker,
    register,
    stored_record,
)
from pipeline.report import model_card
from pipeline.tracking import send
from tests.pipeline import builders
from tests.pipeline.register.test_register import another_model

NAME = "tightbound-blobs-grey8"


def told(params: Any) -> tuple[dict[str, str], str]:
    """Tags and page of version 1."""
    found = Registry(send.open_store(params), NAME)
    entry = found.client.get_model_version(NAME, "1")
    return dict(entry.tags), entry.description


def check(params: Any, result: dict[str, Any]) -> None:
    """All places say the same."""
    tags, page = told(params)
    record = stored_record(tags)
    assert record is not None
    for key in EVIDENCE_KEYS:
        assert record[key] == result[key], key
    for key in ("log_px", "num_samples", "khat_bad_fraction", "looks", "git_commit"):
        assert tags.get(key, "None") == str(result[key]), key
    assert tags["reasons"] == "; ".join(result["reasons"])
    assert f"K = {result['num_samples']:,};" in page
    assert f"| looks at this test split | {result['looks']} |" in page
    if result["git_commit"]:
        assert f"| git commit | {result['git_commit']} |" in page


def evaluated(paths: Any, num_samples: int, **changes: Any) -> None:
    from vae.models import load

    builders.evaluate_outputs(
        paths.evaluate, paths.prepared, load(paths.model), num_samples=num_samples, **changes
    )


def test_weaker_evidence_takes_no_part_of_stronger_s_place(project: Path) -> None:
    params, paths = builders.params(), builders.pipeline_outputs(project)
    first = register(params, paths)
    check(params, first)
    evaluated(paths, 20, khat_bad_fraction=None, bits_per_dim=9.9)
    again = register(params, paths)
    assert again | {"weaker_evidence": None} == first
    assert "K = 20) are weaker evidence" in again["weaker_evidence"]
    check(params, again)


def test_stronger_evidence_replaces_all_of_weaker(project: Path) -> None:
    params, paths = builders.params(), builders.pipeline_outputs(project)
    register(params, paths)
    evaluated(paths, 80, khat_bad_fraction=0.01, bits_per_dim=7.7)
    again = register(params, paths)
    assert (again["num_samples"], again["khat_bad_fraction"]) == (80, 0.01)
    assert again["bits_per_dim"] == 7.7
    check(params, again)


def test_no_tag_outlives_its_run_and_a_person_s_own_stays(project: Path) -> None:
    params, paths = builders.params(), builders.pipeline_outputs(project)
    register(params, paths)
    found = Registry(send.open_store(params), NAME)
    found.tag(1, {"dvc_lock": "of an earlier run", "owner": "me"})
    evaluated(paths, 80, bits_per_dim=None)
    register(params, paths)
    tags, _ = told(params)
    assert "bits_per_dim" not in tags
    assert "dvc_lock" not in tags
    assert tags["owner"] == "me"
    assert set(tags) - {"owner"} <= TAGS


def test_the_looks_and_the_verdict_are_the_same_everywhere_later_on(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project, name="train-poor", start_at_mean=False)
    first = register(params, paths)
    another_model(project, "train-good")
    register(params, paths)
    another_model(project, "train-poor", start_at_mean=False)
    earlier = register(params, paths, ensure=True)
    check(params, earlier)
    assert earlier["looks"] == 2
    assert is_stale(first, earlier)
    assert not is_stale(earlier, register(params, paths, ensure=True))


def test_why_it_is_champion_stays_what_it_was(project: Path) -> None:
    params, paths = builders.params(), builders.pipeline_outputs(project)
    first = register(params, paths)
    for _ in range(2):
        again = register(params, paths, ensure=True)
        assert again["reasons"] == first["reasons"] == ["it is the first: there was no champion"]
        assert not is_stale(first, again)


def test_the_commit_is_that_of_the_training_run(project: Path) -> None:
    params, paths = builders.params(), builders.pipeline_outputs(project)
    run = json.loads((paths.train / "run.json").read_text())
    builders.write_json(paths.train / "run.json", run | {"git_commit": "c" * 40})
    result = register(params, paths)
    assert result["git_commit"] == "c" * 40
    check(params, result)


def test_a_page_that_can_not_be_made_costs_only_itself(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> str:
        raise KeyError("nothing")

    monkeypatch.setattr(model_card, "markdown", broken)
    params = builders.params()
    result = register(params, builders.pipeline_outputs(project))
    assert (result["version"], result["alias"]) == (1, "champion")
    assert "warning: the version has no page (KeyError" in capsys.readouterr().out


def test_a_long_page_is_cut_where_databases_would(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_card, "markdown", lambda *_: "| a row of the page |\n" * 1000)
    params = builders.params()
    register(params, builders.pipeline_outputs(project))
    _, page = told(params)
    assert len(page) <= LONGEST_PAGE
    assert page.endswith("|\n\n… cut here; reports/report.html has it whole\n")


EVIDENCE = {
    "data_hash": "d",
    "proposal": "encoder",
    "target_se": None,
    "precision": "fp32",
    "num_samples": 50,
    "log_px_mc_se": 0.1,
}


@pytest.mark.parametrize(
    ("changes", "weaker"),
    [
        ({}, False),
        ({"num_samples": 20}, True),
        ({"num_samples": 80}, False),
        ({"num_samples": 20, "data_hash": "e"}, False),
        ({"num_samples": 20, "proposal": "refined", "log_px_mc_se": 0.01}, False),
        ({"num_samples": 80, "proposal": "refined", "log_px_mc_se": 0.2}, True),
        ({"precision": "bf16", "log_px_mc_se": None}, True),
    ],
)
def test_which_evidence_is_weaker(changes: dict[str, Any], weaker: bool) -> None:
    assert is_weaker(EVIDENCE | changes, EVIDENCE) is weaker
