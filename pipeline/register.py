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
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pipeline import tracking
from pipeline.gate import CHAMPION, Comparison, Decision, Situation, decide, paired_gain
from pipeline.params import Params, load_params
from pipeline.prepared import Meta, load_meta, load_split
from pipeline.registry import TAKEN_BACK_TAG, WEIGHTS_TAG, Registry, Version
from pipeline.stage import UserError, read_json, run_stage, say, write_json
from pipeline.store import Store, Unreachable, git_commit

EXPERIMENT_VARIABLE = "DVC_EXP_NAME"  # set by `dvc exp run`, in the workspace, --temp and --queue
EVIDENCE, SEEN = "evidence", "evidence/seen.parquet"
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
    version = _version(registry, run_id, meta, metrics, config, paths)
    tracking.send_training(store, paths.train, paths.model, paths.sweep)
    tracking.send_evaluation(store, paths.evaluate, paths.train)
    table = pd.read_parquet(paths.evaluate / "per_example.parquet")
    evidence = dict(zip(table["id"].astype(str), table["log_px"], strict=True))
    settings = EvidenceSettings(meta.hash, metrics["num_samples"], params.evaluate.seed)
    home = version.run_id if store.is_active(version.run_id) else run_id
    _keep_evidence(store, home, settings, evidence, _seen_ids(paths.prepared))

    champion = registry.alias(CHAMPION)
    comparison, why_not = None, None
    if champion is not None and champion != version.number:
        holder = next(v for v in registry.versions() if v.number == champion)
        try:
            comparison = _compare(registry, holder, version, evidence, settings, paths.prepared)
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
    meta: Meta,
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    paths: Paths,
) -> Version:
    """The version with these weights; registered now if there is none, repaired if need be."""
    content = {
        "model": paths.model,
        "reference": paths.evaluate / "reference.json",
        "example": load_split(paths.prepared, "test").x[:EXAMPLES],
    }
    tags = _tags(meta, metrics, config)
    found = registry.with_weights(config["weights_sha256"])
    if found is None:
        return registry.add(run_id, tags=tags, **content)
    registry.restore_files(found, **content)
    registry.tag(found.number, {k: v for k, v in tags.items() if k != "git_commit"})
    return found


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


def measure(meta: Meta) -> str:
    """What log p(x) is a density of; figures of different measures are never compared."""
    shape = "x".join(map(str, meta.data_shape))
    return " ".join(filter(None, (meta.space, meta.binarization, shape)))


class NotComparable(Exception):  # noqa: N818
    """Why two models' log p(x) can't be compared."""


@dataclass(frozen=True)
class EvidenceSettings:
    """What per-example log p(x) depends on besides the model."""

    data_hash: str
    num_samples: int
    seed: int

    @property
    def name(self) -> str:
        return f"{EVIDENCE}/{self.data_hash[:16]}-k{self.num_samples}-seed{self.seed}.parquet"


def _compare(
    registry: Registry,
    champion: Version,
    version: Version,
    evidence: Mapping[str, float],
    settings: EvidenceSettings,
    prepared: Path,
) -> Comparison:
    """The paired gain over the champion, on test examples that neither was trained on."""
    theirs, ours = champion.tags.get("measure"), version.tags.get("measure")
    if theirs != ours:
        raise NotComparable(f"it models {theirs or 'unknown data'}, this one {ours}")
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        if champion.tags.get("data_hash") != settings.data_hash:
            table = _stored(registry.store, champion.run_id, SEEN, folder)
            if table is None:
                raise NotComparable("the data changed, and its own training split isn't known")
            seen = set(table["id"])
        stored = _stored(registry.store, champion.run_id, settings.name, folder)
        if stored is not None:
            known = dict(zip(stored["id"], stored["log_px"], strict=True))
        else:
            known = _score_champion(registry, champion, settings, prepared, Path(folder))
    try:
        return paired_gain(evidence, known, leave_out=seen)
    except ValueError as error:
        raise NotComparable(str(error)) from error


def _score_champion(
    registry: Registry,
    champion: Version,
    settings: EvidenceSettings,
    prepared: Path,
    folder: Path,
) -> dict[str, float]:
    """The champion's log p(x) on the test split, with the same K and seed; kept with its run."""
    from pipeline.evaluate import score_split
    from vae.checkpoint import CheckpointError, load

    say(f"register   scores champion version {champion.number} on this test split")
    test = load_split(prepared, "test")
    try:
        model = load(registry.download(champion.number, folder))
        x = torch.tensor(test.x)  # a copy: what Parquet gives is read-only
        found = score_split(model, x, settings.num_samples, settings.seed)
    except (CheckpointError, ValueError, RuntimeError, Unreachable) as error:
        raise NotComparable(f"it could not be evaluated by this code ({error})") from error
    evidence = dict(zip(test.id.astype(str), found.log_px.tolist(), strict=True))
    with suppress(Unreachable):  # its run may have been deleted
        _keep_evidence(registry.store, champion.run_id, settings, evidence)
    return evidence


def _keep_evidence(
    store: Store,
    run_id: str,
    settings: EvidenceSettings,
    evidence: Mapping[str, float],
    seen: list[str] | None = None,
) -> None:
    """Store per-example log p(x), and the ids of training and validation, with the model's run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(settings.name).name
        table = pd.DataFrame({"id": list(evidence), "log_px": list(evidence.values())})
        table.to_parquet(path, index=False)
        files = {settings.name: path}
        if seen is not None:
            files[SEEN] = Path(folder) / Path(SEEN).name
            pd.DataFrame({"id": seen}).to_parquet(files[SEEN], index=False)
        store.log_files(run_id, files)


def _stored(store: Store, run_id: str, name: str, folder: str) -> pd.DataFrame | None:
    """A table that was stored with a run, if it is there."""
    try:
        with store.failures():
            there = [entry.path for entry in store.client.list_artifacts(run_id, EVIDENCE)]
            if name not in there:
                return None
            return pd.read_parquet(store.client.download_artifacts(run_id, name, folder))
    except Unreachable:
        return None


def _seen_ids(prepared: Path) -> list[str]:
    """Ids of the examples that the model was trained or selected on."""
    parts = [pd.read_parquet(prepared / split, columns=["id"]) for split in ("train", "valid")]
    return pd.concat(parts)["id"].astype(str).tolist()


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


def tell(result: Mapping[str, Any], champion: int | None) -> None:
    """The outcome, for people."""
    name, version = result["model_name"], result["version"]
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
    store = tracking.open_store(params)
    tell(result, Registry(store, result["model_name"]).alias(CHAMPION))


if __name__ == "__main__":
    run_stage(main)
