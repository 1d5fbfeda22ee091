"""Two models meet by the names of their columns, never by their places."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.register import (
    Conversion,
    DataRecord,
    NotComparable,
    Paths,
    Registry,
    conversion,
    register,
)
from pipeline.stage import write_prepared
from pipeline.tracking import send
from tests.pipeline import builders
from vae.models import VAE, VAEConfig, save

NAME = "tightbound-people-continuous"
RECORD = DataRecord(space="continuous", binarization=None, data_shape=(3,), columns=("a", "b", "c"))


def table(rows: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    z = rng.normal(size=rows)
    return pd.DataFrame(
        {"a": z, "b": 50 + 20 * z + rng.normal(size=rows), "c": rng.gamma(2, size=rows)}
    )


def outputs(folder: Path, columns: list[str], name: str, *, names: list[str] | None = None) -> Any:
    """All that register reads, of the table's columns in this order, called `names`."""
    for part in ("data", "model", "train", "evaluate", "sweep"):
        shutil.rmtree(folder / part, ignore_errors=True)
    x, ids = table()[columns].to_numpy(), [str(i) for i in range(200)]
    splits = {
        "train": builders.split(x[:100], ids[:100]),
        "valid": builders.split(x[100:150], ids[100:150]),
        "test": builders.split(x[150:], ids[150:]),
    }
    (folder / "data").mkdir(parents=True)
    facts = {"dataset": "people", "source": "table", "space": "continuous", "binarization": None}
    facts |= {"duplicates": {}, "own_test_split": False, "num_classes": None}
    write_prepared(folder / "data", splits, columns=tuple(names or columns), **facts)
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=(len(columns),),
        space="continuous",
        latent_dim=1,
        likelihood="gaussian",
        hidden=(4,),
    )
    model = VAE(config).eval()
    model.set_data_statistics(torch.tensor(x[:100].mean(0)), torch.tensor(x[:100].std(0)))
    save(model, folder / "model")
    builders.sweep_outputs(folder / "sweep")
    builders.train_outputs(folder / "train", folder / "model", name=name)
    builders.evaluate_outputs(folder / "evaluate", folder / "data", model, bits_per_dim=None)
    return Paths(
        prepared=folder / "data",
        selfcheck=builders.write_json(folder / "selfcheck.json", {"passed": True, "checks": []}),
        sweep=folder / "sweep",
        model=folder / "model",
        train=folder / "train",
        evaluate=folder / "evaluate",
    )


def test_another_order_of_the_same_columns_is_the_same_data(project: Path) -> None:
    """The same model but for the order of its columns gains nothing over itself."""
    params = builders.params()
    register(params, outputs(project, ["a", "b", "c"], "train-1"))
    result = register(params, outputs(project, ["c", "a", "b"], "train-2"))
    assert result["version"] == 2
    assert result["num_pairs"] == 50
    assert abs(result["gain"]) < 1.0  # untrained weights differ in what they belong to
    by_place = outputs(project, ["a", "b", "c"], "train-3")
    model = torch.tensor(table()[["c", "a", "b"]].to_numpy()[150:])
    from vae.evidence import importance_sampling
    from vae.models import load

    wrong = importance_sampling(load(by_place.model), model, 50).log_px.mean()
    assert wrong < -100  # what the columns' places would have made of it


def test_the_champion_s_log_px_is_its_own_whatever_the_order(project: Path) -> None:
    params = builders.params()
    paths = outputs(project, ["a", "b", "c"], "train-1")
    register(params, paths)
    own = pd.read_parquet(paths.evaluate / "per_example.parquet").set_index("id")["log_px"]
    register(params, outputs(project, ["c", "b", "a"], "train-2"))
    found = Registry(send.open_store(params), NAME)
    run_id = found.versions()[0].run_id
    names = [e.path for e in found.client.list_artifacts(run_id, "evidence")]
    (kept,) = [name for name in names if "-by-name-" in name]
    scored = pd.read_parquet(found.client.download_artifacts(run_id, kept)).set_index("id")
    np.testing.assert_allclose(scored["log_px"], own[scored.index], atol=0.5)


@pytest.mark.parametrize(
    ("columns", "names", "reason"),
    [
        (["b", "a", "c"], ["b", "a", "d"], "it models the columns c, a, b, this one d, b, a"),
        (["a", "b"], None, "it models continuous 3, this one continuous 2"),
        (["a", "b", "c"], ["x", "y", "z"], "it models the columns a, b, c, this one x, y, z"),
    ],
)
def test_other_columns_are_not_comparable(
    project: Path, columns: list[str], names: list[str] | None, reason: str
) -> None:
    params = builders.params()
    register(params, outputs(project, ["a", "b", "c"], "train-1"))
    result = register(params, outputs(project, columns, "train-2", names=names))
    assert result["verdict"] == "not comparable"
    assert result["reasons"] == [f"not comparable with champion version 1: {reason}"]
    assert result["champion"] == 1


def test_the_same_values_under_other_names_are_other_data(project: Path) -> None:
    """Their data have one hash, and evidence is stored for it."""
    params = builders.params()
    register(params, outputs(project, ["a", "b", "c"], "train-1"))
    paths = outputs(project, ["a", "b", "c"], "train-2", names=["a", "c", "b"])
    torch.manual_seed(1)
    model = VAE(VAEConfig(data_shape=(3,), space="continuous", latent_dim=2, likelihood="laplace"))
    save(model, paths.model)
    result = register(params, paths)
    assert (result["version"], result["num_pairs"]) == (2, 50)
    assert result["gain"] > 10  # the champion was given c for b, as they are named


def test_columns_are_found_by_name() -> None:
    x = np.arange(6.0).reshape(2, 3)
    convert = conversion(RECORD, replace(RECORD, columns=("c", "a", "b")))
    np.testing.assert_array_equal(convert(x), x[:, [1, 2, 0]])
    assert conversion(RECORD, RECORD) == Conversion((0, 1, 2))
    picture = DataRecord(space="grey8", binarization=None, data_shape=(1, 2, 2), columns=None)
    assert conversion(picture, picture) == Conversion(None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": ("a", "b", "d")}, "columns c, a, b, this one d, a, b"),
        ({"columns": None}, "it models the columns a, b, c, this one of a picture"),
        ({"space": "grey8"}, "it models continuous 3, this one grey8 3"),
        ({"data_shape": (2,), "columns": ("a", "b")}, "continuous 3, this one continuous 2"),
        ({"binarization": "threshold"}, "this one continuous threshold 3"),
    ],
)
def test_what_is_not_comparable_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotComparable, match=words):
        conversion(RECORD, replace(RECORD, **changes))


def test_a_version_without_a_record_is_not_comparable() -> None:
    with pytest.raises(NotComparable, match="no record"):
        DataRecord.of_version(None, {})
    unnamed = DataRecord.of_version("continuous 3", {})
    with pytest.raises(NotComparable, match="names of its columns are not on record"):
        conversion(unnamed, RECORD)
    assert DataRecord.of_version("continuous 3", {"columns": ["a", "b", "c"]}) == RECORD
