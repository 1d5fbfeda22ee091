"""Register stage: the model becomes a version in MLflow's registry, and champion if it earns it.

Reads data/prepared, models/vae, reports/{selfcheck.json, sweep, train, evaluate}.
Writes reports/register.json: version, alias, verdict and its reasons.

The registry is outside DVC. `--ensure` ends every `make run`: it brings registry and runs in line
with the outputs that DVC holds (after mlflow.db was deleted, the address changed, or DVC restored
earlier outputs without running a stage), says who is champion, and has DVC make register.json and
the report again where they say otherwise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.params import PlainParams, load_plain_params
from pipeline.register.champion import (
    compare,
    evidence_name,
    keep_evidence,
    seen_examples,
    stored_evidence,
)
from pipeline.register.comparable import DataRecord, NotComparable
from pipeline.register.gate import (
    CHAMPION,
    MOST_BAD_KHAT,
    STANDARD_ERRORS,
    Comparison,
    Decision,
    Situation,
    decide,
)
from pipeline.register.record import (
    EVIDENCE_KEYS,
    VERDICT_KEYS,
    is_weaker,
    record_tags,
    stored_record,
)
from pipeline.register.registry import TAKEN_BACK_TAG, WEIGHTS_TAG, Registry, Version
from pipeline.report import model_card
from pipeline.stage import (
    EXPERIMENT_VARIABLE,
    QUIET,
    VERBOSITY_VARIABLE,
    Meta,
    UserError,
    load_meta,
    load_split,
    read_json,
    run_stage,
    say,
    write_json,
)
from pipeline.tracking import Store, Unreachable, git_commit, mirror as tracking, send
from vae.evidence import EvidenceSettings
from vae.system import file_hash

EXAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The stage's inputs, as dvc.yaml names them."""

    prepared: Path
    selfcheck: Path
    sweep: Path
    model: Path
    train: Path
    evaluate: Path


def register(
    params: PlainParams, paths: Paths, *, ensure: bool = False, page: Path | None = None
) -> dict[str, Any]:
    """Register the model, let the gate decide, and return what register.json holds.

    The same weights never make a second version. With `ensure`, a person's rollback outweighs
    `register.promote: true`, the version is tagged with the hash of dvc.lock, and the report's
    `page`, if there is one, goes to the model's run.
    Raises UserError when the registry does not answer or the self-check did not pass.
    """
    if not read_json(paths.selfcheck)["passed"]:
        raise UserError(f"{paths.selfcheck}: the estimators disagree with exact answers")
    store = send.open_store(params)
    try:
        result = _register(params, paths, store, ensure)
        if ensure and page is not None and page.is_file():
            send.send_report(store, page, paths.train)
        return result
    except Unreachable as error:
        raise UserError(send.unreachable_message(store.address, error)) from error


def _register(params: PlainParams, paths: Paths, store: Store, ensure: bool) -> dict[str, Any]:
    meta = load_meta(paths.prepared)
    metrics = read_json(paths.evaluate / "metrics.json")
    config = read_json(paths.model / "config.json")
    _check_weights(paths.model, config["weights_sha256"])
    registry = Registry(store, f"tightbound-{meta.dataset}-{meta.space}")
    registry.ensure_exists()

    run_id = send.model_run(store, paths.train)
    version = _version(registry, run_id, params, meta, config, paths)
    send.send_training(store, paths.train, paths.model, paths.sweep)
    send.send_evaluation(store, paths.evaluate, paths.train)
    store.log_data(run_id, asdict(meta))
    table = pd.read_parquet(paths.evaluate / "per_example.parquet")
    evidence = dict(zip(table["id"].astype(str), table["log_px"], strict=True))
    settings = EvidenceSettings.of({"seed": params.evaluate.seed, **metrics})
    home = version.run_id if store.is_active(version.run_id) else run_id
    keep_evidence(
        store, home, evidence_name(meta.hash, settings), evidence, seen_examples(paths.prepared)
    )

    before = stored_record(version.tags) or {}
    measured = {key: metrics.get(key) for key in EVIDENCE_KEYS}
    measured |= {"data_hash": meta.hash, "seed": settings.seed}
    kept = bool(before) and is_weaker(measured, before)
    if kept:
        measured = {key: before[key] for key in EVIDENCE_KEYS}
        settings = EvidenceSettings.of(before)
        name = evidence_name(meta.hash, settings)
        evidence = stored_evidence(store, version.run_id, name) or {}
    decision, verdict = _decided(
        registry, version, before, measured, params, ensure,
        lambda holder: compare(registry, holder, evidence, settings, paths.prepared),
    )  # fmt: skip
    _apply(registry, version, decision)
    result = {
        "model_name": registry.name,
        "version": version.number,
        "alias": decision.alias,
        **verdict,
        "champion": registry.alias(CHAMPION),
        "looks": sum(v.tags.get("data_hash") == meta.hash for v in registry.versions()),
        "selfcheck": _selfcheck(paths.selfcheck),
        **measured,
        "weaker_evidence": _told(metrics) if kept else None,
        "weights_hash": config["weights_sha256"],
        "git_commit": _commit(paths.train, version),
        "run_id": version.run_id,
        "tracking_uri": store.public_address,
    }
    tags = record_tags(result, config["model"], DataRecord.of_meta(meta).measure)
    lock = _lock_hash() if ensure else None
    if lock is not None:
        tags["dvc_lock"] = lock
    registry.set_record(version.number, tags, _page(result, meta, metrics, config, paths, lock))
    return result


def _decided(
    registry: Registry,
    version: Version,
    before: Mapping[str, Any],
    measured: Mapping[str, Any],
    params: PlainParams,
    ensure: bool,
    compare_with: Callable[[Version], Comparison],
) -> tuple[Decision, dict[str, Any]]:
    """The gate's decision, and what register.json says of it.

    before: the version's record, if it has one; what made it champion stays what it was.
    """
    champion = registry.alias(CHAMPION)
    stands = champion == version.number and before.get("verdict") == CHAMPION
    comparison, why_not = None, None
    if champion is not None and champion != version.number:
        holder = next(v for v in registry.versions() if v.number == champion)
        try:
            comparison = compare_with(holder)
        except NotComparable as reason:
            why_not = str(reason)
    decision = decide(
        Situation(
            version=version.number,
            champion=champion,
            khat_bad_fraction=measured["khat_bad_fraction"],
            num_unscored=measured["num_unscored"] or 0,
            comparison=comparison,
            not_comparable=why_not,
            promote=params.register.promote,
            experiment=os.environ.get(EXPERIMENT_VARIABLE),
            taken_back=_taken_back(version, params, ensure),
            promoted_for=tuple(before["reasons"]) if stands else (),
        )
    )
    if stands:
        return decision, {key: before[key] for key in VERDICT_KEYS}
    return decision, {
        "verdict": decision.verdict,
        "reasons": list(decision.reasons),
        "gain": comparison and comparison.gain,
        "gain_se": comparison and comparison.gain_se,
        "num_pairs": comparison and comparison.num_examples,
        "num_left_out": comparison and comparison.num_left_out,
        "compared_with": champion if comparison else None,
        "gate": {
            "passed": decision.gate,
            "standard_errors": STANDARD_ERRORS,
            "most_bad_khat": MOST_BAD_KHAT,
        },
    }


def _version(
    registry: Registry,
    run_id: str,
    params: PlainParams,
    meta: Meta,
    config: Mapping[str, Any],
    paths: Paths,
) -> Version:
    """The version with these weights; registered now if there is none, repaired if need be."""
    content = {
        "model": paths.model,
        "reference": paths.evaluate / "reference.json",
        "data": _data(meta, params),
        "example": load_split(paths.prepared, "test").x[:EXAMPLES],
    }
    found = registry.with_weights(config["weights_sha256"])
    if found is not None and content["data"]["columns"] is not None:
        known = registry.data_of(found).get("columns", content["data"]["columns"])
        if known != content["data"]["columns"]:
            found = None  # the same numbers under other names are another model
    if found is None:
        tags = {WEIGHTS_TAG: config["weights_sha256"], "data_hash": meta.hash}
        return registry.add(run_id, tags=tags, **content)
    registry.restore_files(found, **content)
    if found.tags.get("data_hash") != meta.hash:
        registry.tag(found.number, {"data_hash": meta.hash})
    return found


def _data(meta: Meta, params: PlainParams) -> dict[str, Any]:
    """What a registered model must know of its data to take new data as it was prepared."""
    return {
        "dataset": meta.dataset,
        "space": meta.space,
        "binarization": meta.binarization,
        "data_shape": list(meta.data_shape),
        "data_hash": meta.hash,
        "columns": None if meta.columns is None else list(meta.columns),
        "filled": meta.filled,
        "converts": params.data.size is not None or params.data.channels is not None,
    }


def _told(metrics: Mapping[str, Any]) -> str:
    """Evidence that was not taken, in words."""
    return (
        f"this run's {metrics['log_px']:.2f} nats (K = {metrics['num_samples']:,}) are weaker "
        "evidence than what the version has on record, which stays"
    )


def _commit(train: Path, version: Version) -> str | None:
    """The commit that the model was trained at, as its run says; earlier runs did not say."""
    known = read_json(train / "run.json").get("git_commit")
    return known or version.tags.get("git_commit") or git_commit()


def _taken_back(version: Version, params: PlainParams, ensure: bool) -> str | None:
    """How a person took the alias from this version; asking again by `true` lifts that."""
    if params.register.promote is True and not ensure:
        return None
    return version.tags.get(TAKEN_BACK_TAG)


def _apply(registry: Registry, version: Version, decision: Decision) -> None:
    if decision.alias == CHAMPION:
        registry.set_champion(version.number, decision.reasons[0])
    else:
        registry.set_challenger(version.number)


def _selfcheck(path: Path) -> dict[str, Any]:
    found = read_json(path)
    passed = sum(bool(check["passed"]) for check in found["checks"])
    return {
        "passed": found["passed"],
        "passed_checks": passed,
        "num_checks": len(found["checks"]),
    }


def _page(
    result: Mapping[str, Any],
    meta: Meta,
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    paths: Paths,
    lock: str | None,
) -> str | None:
    """The version's description; dvc.lock is final only at the end, in `ensure`.

    A page that can't be made costs a warning and no more. None where the evidence on record is of
    another run, whose page stays.
    """
    if result["weaker_evidence"]:
        return None
    try:
        facts = read_json(paths.train / "run.json")["params"]
        objective = {
            key.removeprefix("objective."): value
            for key, value in facts.items()
            if key.startswith("objective.")
        }
        history = pd.read_csv(paths.train / "history.csv")
        return model_card.markdown(
            result, asdict(meta), config["model"], objective or None, metrics, history, lock
        )
    except Exception as error:  # whatever it stumbles over: the version is registered
        say(f"register   warning: the version has no page ({type(error).__name__}: {error})")
        return None


def _lock_hash() -> str | None:
    lock = Path("dvc.lock")
    return file_hash(lock) if lock.is_file() else None


def _check_weights(model: Path, expected: str) -> None:
    found = file_hash(model / "weights.safetensors")
    if found != expected:
        raise UserError(
            f"{model}/weights.safetensors is not what config.json says (SHA-256 {found[:12]}…, "
            f"expected {expected[:12]}…); `dvc repro --force train` remakes both"
        )


def tell(result: Mapping[str, Any]) -> None:
    """The outcome, for people."""
    name, version, champion = (result[key] for key in ("model_name", "version", "champion"))
    say(f"register   {name} version {version}: {result['verdict']}; {'; '.join(result['reasons'])}")
    if champion != version:
        who = "there is no champion" if champion is None else f"the champion is version {champion}"
        say(f"register   {who}; `make promote VERSION={version}` would change that")


def main() -> None:
    parser = argparse.ArgumentParser(description="Register the model; the gate decides.")
    for name, default in {
        "prepared": "data/prepared",
        "selfcheck": "reports/selfcheck.json",
        "sweep": "reports/sweep",
        "model": "models/vae",
        "train": "reports/train",
        "evaluate": "reports/evaluate",
        "register": "reports/register.json",
        "report": "reports/report.html",
    }.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(default))
    parser.add_argument("--ensure", action="store_true")
    given = vars(parser.parse_args())
    ensure, out, page = given.pop("ensure"), given.pop("register"), given.pop("report")
    params = load_plain_params()
    before = read_json(out) if ensure else None  # the stage must have run
    result = register(params, Paths(**given), ensure=ensure, page=page)
    if before is None:
        write_json(out, result)
    elif is_stale(before, result):
        remake()
    tell(result)


def is_stale(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether register.json says anything else than the registry does now."""
    return any(before.get(key) != now[key] for key in now)


def remake() -> None:
    """Have DVC run the stage and the report again: DVC restored their outputs of an earlier time.

    Without DVC (a lone call of this module) nothing is done.
    """
    if not (Path("dvc.yaml").is_file() and Path("dvc.lock").is_file()):
        return
    alone = os.environ | {VERBOSITY_VARIABLE: QUIET, tracking.ENSURE_FOLLOWS_VARIABLE: ""}
    for command in (["repro", "--force", "--single-item", "register"], ["repro", "report"]):
        subprocess.run([sys.executable, "-m", "dvc", *command, "--quiet"], env=alone, check=True)
    say("register   the registry has changed: reports/register.json and the report say so now")


if __name__ == "__main__":
    run_stage(main)
