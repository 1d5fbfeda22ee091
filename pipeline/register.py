"""Register stage: the model becomes a version in MLflow's registry, and champion if it earns it.

Reads data/prepared, models/vae, reports/{selfcheck.json, sweep, train, evaluate}.
Writes reports/register.json: version, alias, verdict and its reasons.

The registry is outside DVC. `--ensure` ends every `make run`: it brings registry and runs in line
with the outputs that DVC holds (after mlflow.db was deleted, the address changed, or DVC restored
earlier outputs without running a stage), leaves register.json alone and says who is champion.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import tracking
from pipeline.champion import (
    EvidenceSettings,
    NotComparable,
    compare,
    keep_evidence,
    measure,
    seen_ids,
)
from pipeline.gate import CHAMPION, Decision, Situation, decide
from pipeline.params import Params, load_params
from pipeline.prepared import Meta, load_meta, load_split
from pipeline.registry import TAKEN_BACK_TAG, WEIGHTS_TAG, Registry, Version
from pipeline.stage import UserError, read_json, run_stage, say, write_json
from pipeline.store import Store, Unreachable, git_commit

EXPERIMENT_VARIABLE = "DVC_EXP_NAME"  # set by `dvc exp run`, in the workspace, --temp and --queue
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


def register(params: Params, paths: Paths, *, ensure: bool = False) -> dict[str, Any]:
    """Register the model, let the gate decide, and return what register.json holds.

    The same weights never make a second version. With `ensure`, a person's rollback outweighs
    `register.promote: true`, and the version is tagged with the hash of dvc.lock.
    Raises UserError when the registry does not answer or the self-check did not pass.
    """
    if not read_json(paths.selfcheck)["passed"]:
        raise UserError(f"{paths.selfcheck}: the estimators disagree with exact answers")
    store = tracking.open_store(params)
    try:
        return _register(params, paths, store, ensure)
    except Unreachable as error:
        raise UserError(tracking.unreachable_message(store.address, error)) from error


def _register(params: Params, paths: Paths, store: Store, ensure: bool) -> dict[str, Any]:
    meta = load_meta(paths.prepared)
    metrics = read_json(paths.evaluate / "metrics.json")
    config = read_json(paths.model / "config.json")
    _check_weights(paths.model, config["weights_sha256"])
    registry = Registry(store, f"tightbound-{meta.dataset}-{meta.space}")
    registry.ensure_exists()

    run_id = tracking.model_run(store, paths.train)
    version = _version(registry, run_id, params, meta, metrics, config, paths)
    tracking.send_training(store, paths.train, paths.model, paths.sweep)
    tracking.send_evaluation(store, paths.evaluate, paths.train)
    table = pd.read_parquet(paths.evaluate / "per_example.parquet")
    evidence = dict(zip(table["id"].astype(str), table["log_px"], strict=True))
    settings = EvidenceSettings(
        meta.hash,
        metrics["num_samples"],
        params.evaluate.seed,
        metrics.get("proposal", "encoder"),
    )
    home = version.run_id if store.is_active(version.run_id) else run_id
    keep_evidence(store, home, settings, evidence, seen_ids(paths.prepared))

    champion = registry.alias(CHAMPION)
    comparison, why_not = None, None
    if champion is not None and champion != version.number:
        holder = next(v for v in registry.versions() if v.number == champion)
        try:
            comparison = compare(registry, holder, version, evidence, settings, paths.prepared)
        except NotComparable as reason:
            why_not = str(reason)
    decision = decide(
        Situation(
            version=version.number,
            champion=champion,
            khat_bad_fraction=metrics["khat_bad_fraction"],
            comparison=comparison,
            not_comparable=why_not,
            promote=params.register.promote,
            experiment=os.environ.get(EXPERIMENT_VARIABLE),
            taken_back=_taken_back(version, params, ensure),
        )
    )
    _apply(registry, version, decision)
    looks = sum(v.tags.get("data_hash") == meta.hash for v in registry.versions())
    result = {
        "model_name": registry.name,
        "version": version.number,
        "alias": decision.alias,
        "verdict": decision.verdict,
        "reasons": list(decision.reasons),
        "gain": comparison and comparison.gain,
        "gain_se": comparison and comparison.gain_se,
        "num_pairs": comparison and comparison.num_examples,
        "compared_with": champion if comparison else None,
        "champion": registry.alias(CHAMPION),
        "looks": looks,
        "log_px": metrics["log_px"],
        "bits_per_dim": metrics["bits_per_dim"],
        "num_samples": metrics["num_samples"],
        "khat_bad_fraction": metrics["khat_bad_fraction"],
        "weights_hash": config["weights_sha256"],
        "data_hash": meta.hash,
        "run_id": version.run_id,
        "tracking_uri": store.public_address,
    }
    _write_on_version(registry, version, result, ensure)
    return result


def _version(
    registry: Registry,
    run_id: str,
    params: Params,
    meta: Meta,
    metrics: Mapping[str, Any],
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
    tags = _tags(meta, metrics, config)
    found = registry.with_weights(config["weights_sha256"])
    if found is None:
        return registry.add(run_id, tags=tags, **content)
    registry.restore_files(found, **content)
    registry.tag(found.number, {k: v for k, v in tags.items() if k != "git_commit"})
    return found


def _data(meta: Meta, params: Params) -> dict[str, Any]:
    """What a registered model must know of its data to take new data as it was prepared."""
    return {
        "dataset": meta.dataset,
        "space": meta.space,
        "columns": None if meta.columns is None else list(meta.columns),
        "filled": meta.filled,
        "converts": params.data.size is not None or params.data.channels is not None,
    }


def _tags(meta: Meta, metrics: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    model = config["model"]
    tags = {
        WEIGHTS_TAG: config["weights_sha256"],
        "data_hash": meta.hash,
        "measure": measure(meta),
        "likelihood": model["likelihood"],
        "latent_dim": model["latent_dim"],
        "log_px": metrics["log_px"],
        "log_px_se": metrics["log_px_se"],
        "bits_per_dim": metrics["bits_per_dim"],
        "num_samples": metrics["num_samples"],
        "khat_bad_fraction": metrics["khat_bad_fraction"],
        "git_commit": git_commit(),
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def _taken_back(version: Version, params: Params, ensure: bool) -> str | None:
    """How a person took the alias from this version; asking again by `true` lifts that."""
    if params.register.promote is True and not ensure:
        return None
    return version.tags.get(TAKEN_BACK_TAG)


def _apply(registry: Registry, version: Version, decision: Decision) -> None:
    if decision.alias == CHAMPION:
        registry.set_champion(version.number, decision.reasons[0])
    else:
        registry.set_challenger(version.number)


def _write_on_version(
    registry: Registry, version: Version, result: Mapping[str, Any], ensure: bool
) -> None:
    """Verdict, figures and how to load it, on the version's page."""
    tags = {"verdict": str(result["verdict"]), "reasons": "; ".join(result["reasons"])}
    lock = Path("dvc.lock")
    if ensure and lock.is_file():
        tags["dvc_lock"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    registry.tag(version.number, tags)
    bits = result["bits_per_dim"]
    unit = "" if bits is None else f", {bits:.4f} bits/dim"
    share = result["khat_bad_fraction"]
    khat = "an unknown share of the images" if share is None else f"{share:.1%} of the images"
    registry.describe(
        version.number,
        f"**{result['verdict']}**: {'; '.join(result['reasons'])}.\n\n"
        f"Test log p(x) = {result['log_px']:.2f} nats{unit} (importance sampling, "
        f"K = {result['num_samples']}, khat > 0.7 on {khat}).\n\n"
        f'```python\nmlflow.pyfunc.load_model("models:/{registry.name}/{version.number}")'
        '.predict(x, params={"task": "score"})\n```\n',
    )


def _check_weights(model: Path, expected: str) -> None:
    with (model / "weights.safetensors").open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
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
    }.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(default))
    parser.add_argument("--ensure", action="store_true")
    given = vars(parser.parse_args())
    ensure, out = given.pop("ensure"), given.pop("register")
    params = load_params()
    if ensure:
        read_json(out)  # the stage must have run
    result = register(params, Paths(**given), ensure=ensure)
    if not ensure:
        write_json(out, result)
    tell(result)


if __name__ == "__main__":
    run_stage(main)
