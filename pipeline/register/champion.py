"""Champion and challenger on the same test examples: per-example log p(x), stored or estimated.

Each model's run keeps its per-example log p(x) (by data hash, K and seed) and the content hashes
of the examples that it was trained or selected on, so that a later model is compared without
estimating the champion's again, and never on what the champion has seen, whatever its name, order
or split is now.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from pipeline.register.comparable import Conversion, DataRecord, NotComparable, conversion
from pipeline.register.gate import Comparison, paired_gain
from pipeline.register.registry import Registry, Version
from pipeline.stage import load_meta, load_split, say, shard_paths
from pipeline.tracking import Store, Unreachable
from vae.evidence import EvidenceSettings

EVIDENCE, SEEN = "evidence", "evidence/seen.parquet"


def evidence_name(data_hash: str, settings: EvidenceSettings) -> str:
    """Where per-example log p(x) of data is stored with a model's run."""
    how = f"{settings.proposal}-k{settings.num_samples}-seed{settings.seed}"
    how += "" if settings.target_se is None else f"-se{settings.target_se:g}"
    how += "" if settings.precision == "fp32" else f"-{settings.precision}"
    return f"{EVIDENCE}/{data_hash[:16]}-{how}.parquet"


def evidence_name_by_columns(
    data_hash: str, settings: EvidenceSettings, columns: Sequence[str] | None
) -> str:
    """The same for a model of other data, which was given these columns by their names."""
    names = hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:8]
    return evidence_name(data_hash, settings).replace(".parquet", f"-by-name-{names}.parquet")


def compare(
    registry: Registry,
    champion: Version,
    evidence: Mapping[str, float],
    settings: EvidenceSettings,
    prepared: Path,
) -> Comparison:
    """The paired gain over the champion, on test examples that neither was trained on.

    Columns are matched by name; raises NotComparable where the two model different data.
    """
    theirs = DataRecord.of_version(champion.tags.get("measure"), registry.data_of(champion))
    meta = load_meta(prepared)
    ours = DataRecord.of_meta(meta)
    convert = conversion(theirs, ours)
    own_data = champion.tags.get("data_hash") == meta.hash
    same_names = own_data and theirs.columns == ours.columns
    name = (
        evidence_name(meta.hash, settings)
        if same_names
        else evidence_name_by_columns(meta.hash, settings, ours.columns)
    )
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        if not own_data:
            table = _stored(registry.store, champion.run_id, SEEN, folder)
            if table is None or "content" not in table:
                raise NotComparable("the data changed, and its own training split isn't known")
            test = _columns(prepared, "test", ["id", "content"])
            seen = set(test["id"][test["content"].isin(table["content"])])
        known = stored_evidence(registry.store, champion.run_id, name)
        if known is None:
            known = _score_champion(registry, champion, settings, prepared, Path(folder), convert)
            with suppress(Unreachable):  # its run may have been deleted
                keep_evidence(registry.store, champion.run_id, name, known)
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
    convert: Conversion,
) -> dict[str, float]:
    """The champion's log p(x) on the test split, with the same K and seed."""
    import torch

    from vae.models import CheckpointError, load

    say(f"register   scores champion version {champion.number} on this test split")
    test = load_split(prepared, "test")
    try:
        model = load(registry.download(champion.number, folder))
        x = torch.tensor(convert(test.x))  # a copy: what Parquet gives is read-only
        log_px = settings.log_px(model, x)
    except (CheckpointError, ValueError, RuntimeError, Unreachable) as error:
        raise NotComparable(f"it could not be evaluated by this code ({error})") from error
    return dict(zip(test.id.astype(str), log_px.tolist(), strict=True))


def keep_evidence(
    store: Store,
    run_id: str,
    name: str,
    evidence: Mapping[str, float],
    seen: pd.DataFrame | None = None,
) -> None:
    """Store per-example log p(x) as `name`, and what `seen_examples` found, with a model's run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        table = pd.DataFrame({"id": list(evidence), "log_px": list(evidence.values())})
        table.to_parquet(path, index=False)
        files = {name: path}
        if seen is not None:
            files[SEEN] = Path(folder) / Path(SEEN).name
            seen.to_parquet(files[SEEN], index=False)
        store.log_files(run_id, files)


def stored_evidence(store: Store, run_id: str, name: str) -> dict[str, float] | None:
    """Per-example log p(x) that `keep_evidence` stored with a run, if it is there."""
    with tempfile.TemporaryDirectory() as folder:
        table = _stored(store, run_id, name, folder)
    return None if table is None else dict(zip(table["id"], table["log_px"], strict=True))


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


def seen_examples(prepared: Path) -> pd.DataFrame:
    """Column `content` of the examples that the model was trained or selected on."""
    return pd.concat([_columns(prepared, split, ["content"]) for split in ("train", "valid")])


def _columns(prepared: Path, split: str, names: list[str]) -> pd.DataFrame:
    """Columns of a split, without its x."""
    parts = [pd.read_parquet(path, columns=names) for path in shard_paths(prepared, split)]
    return pd.concat(parts, ignore_index=True)
