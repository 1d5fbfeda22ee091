"""Batch scoring: every form of the data gives the served model's figures, in order, resumably."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.register import register
from pipeline.score import PackedModel, Task, open_input, packed_model
from pipeline.score.__main__ import _plan, main
from pipeline.stage import UserError, load_split
from tests.pipeline import builders

ROOT = Path(__file__).resolve().parents[3]
K = 4000  # so that a chunk has 32 examples


def model(**changes: Any) -> PackedModel:
    facts = {"folder": Path("m"), "weights_hash": "w", "space": "grey8", "data_shape": (1, 4, 4)}
    return PackedModel(**{**facts, "num_samples": K, "columns": None} | changes)


def chunks(path: Path, packed: PackedModel, done: set[str] | None = None) -> list[Any]:
    source = open_input(path, packed, K)
    assert source.layout.rows == 32
    return [
        chunk
        for stream in source.streams
        for chunk in stream.read(stream, source.layout, done or ())
    ]


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 1, 4, 4), dtype=np.uint8)


def images(folder: Path, x: np.ndarray) -> Path:
    for index, image in enumerate(x):
        path = folder / f"{index // 50}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
    return folder


def write(kind: str, folder: Path, x: np.ndarray) -> Path:
    flat = pd.DataFrame(x.reshape(len(x), -1), columns=[f"p{i}" for i in range(16)])
    path = folder / f"data.{kind.partition('-')[0]}"
    if kind == "npz":
        np.savez_compressed(path, x=x, label=np.zeros(len(x)))
    elif kind == "npz-flat":
        np.savez(path, pixels=x.reshape(len(x), 16), other=np.zeros(3))
    elif kind == "npz-last":
        np.savez(path, np.moveaxis(x, 1, -1))
    elif kind == "csv":
        flat.assign(label=1).to_csv(path, index=False)
    elif kind == "parquet":
        flat.to_parquet(path, index=False, row_group_size=9)
    else:
        tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(x)
        pq.write_table(pa.table({"x": tensors}), path, row_group_size=50)
    return path


@pytest.mark.parametrize(
    "kind", ["npz", "npz-flat", "npz-last", "csv", "parquet", "parquet-tensors"]
)
def test_a_file_is_read_in_chunks_with_its_row_numbers(
    tmp_path: Path, x: np.ndarray, kind: str
) -> None:
    path = write(kind, tmp_path, x)
    assert open_input(path, model(), K).rows == 70
    found = chunks(path, model())
    assert [len(chunk.id) for chunk in found] == [32, 32, 6]
    together = np.concatenate([chunk.x for chunk in found])
    np.testing.assert_array_equal(together.reshape(x.shape), x)
    assert [id for chunk in found for id in chunk.id] == [str(row) for row in range(70)]
    (last,) = chunks(path, model(), done={found[0].name, found[1].name})
    np.testing.assert_array_equal(last.x, found[2].x)
    assert last.id == found[2].id


def test_a_folder_of_images_keeps_its_names(tmp_path: Path, x: np.ndarray) -> None:
    found = chunks(images(tmp_path / "images", x), model())
    assert [id for chunk in found for id in chunk.id][48:52] == [
        "0/048.png", "0/049.png", "1/050.png", "1/051.png",
    ]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate([chunk.x for chunk in found]), x)


def test_ids_of_the_data_are_kept_and_columns_found_by_name(tmp_path: Path) -> None:
    table = pd.DataFrame({"b": [2.0, 4.0], "id": ["p", "q"], "a": [1.0, 3.0], "note": ["", ""]})
    packed = model(space="continuous", data_shape=(2,), columns=["a", "b"])
    for name in ("t.csv", "t.parquet"):
        path = tmp_path / name
        table.to_csv(path, index=False) if name == "t.csv" else table.to_parquet(path)
        (found,) = chunks(path, packed)
        assert found.id == ["p", "q"]
        np.testing.assert_array_equal(found.x, [[1, 2], [3, 4]])


def test_new_data_is_taken_as_the_models_own_was_prepared(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1.0, None], "b": [2.0, 4.0]}).to_csv(tmp_path / "t.csv", index=False)
    packed = model(space="continuous", data_shape=(2,), columns=["a", "b"], filled={"a": 7.0})
    (found,) = chunks(tmp_path / "t.csv", packed)
    np.testing.assert_array_equal(found.x, [[1, 2], [7, 4]])
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "large.png")
    (found,) = chunks(tmp_path / "large.png", model(converts=True))
    np.testing.assert_array_equal(found.x, np.full((1, 1, 4, 4), 90))


def test_rows_of_several_files_are_told_apart(tmp_path: Path, x: np.ndarray) -> None:
    for name in ("b", "a"):
        np.savez(tmp_path / f"{name}.npz", x=x[:2])
    found = chunks(tmp_path, model())
    assert [id for chunk in found for id in chunk.id] == [
        "a.npz:0",
        "a.npz:1",
        "b.npz:0",
        "b.npz:1",
    ]


def test_black_and_white_pictures_are_zero_and_one_to_a_binary_model(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (3, 1, 4, 4), dtype=np.uint8)
    (found,) = chunks(images(tmp_path / "bw", 255 * bits), model(space="binary"))
    np.testing.assert_array_equal(found.x, bits)
    images(tmp_path / "grey", bits + 7)
    with pytest.raises(
        UserError, match=r"000\.png has grey levels; the model takes black and white"
    ):
        chunks(tmp_path / "grey", model(space="binary"))


def test_what_can_not_be_scored_is_told_by_name(tmp_path: Path, x: np.ndarray) -> None:
    cases = {
        "not there": (tmp_path / "none", "none is not there"),
        "no data": (tmp_path, "holds no image, npz, npy, csv or Parquet file; expected one kind"),
    }
    for path, words in cases.values():
        with pytest.raises(UserError, match=words):
            chunks(path, model())
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png cannot be read as an image"):
        chunks(tmp_path / "broken.png", model())
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "tall.png")
    with pytest.raises(UserError, match=r"tall\.png has shape \(1, 5, 4\).*takes \(1, 4, 4\)"):
        chunks(tmp_path / "tall.png", model())
    pd.DataFrame({"a": [1.0]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(UserError, match=r"t\.csv: column 'b' is missing; it has 'a'"):
        chunks(tmp_path / "t.csv", model(data_shape=(2,), columns=["a", "b"]))
    with pytest.raises(UserError, match=r"expected 16 columns; found 1"):
        chunks(tmp_path / "t.csv", model())
    np.savez(tmp_path / "two.npz", a=x, b=x)
    with pytest.raises(UserError, match=r"or one named x; found a \(70, 1, 4, 4\), b"):
        chunks(tmp_path / "two.npz", model())
    with pytest.raises(UserError, match="holds files of several kinds"):
        chunks(tmp_path, model())


def test_another_model_seed_or_file_is_another_plan(tmp_path: Path, x: np.ndarray) -> None:
    path = write("npz", tmp_path, x)
    source = open_input(path, model(), K)
    plans = {
        _plan(model(), source, Task()),
        _plan(model(weights_hash="v"), source, Task()),
        _plan(model(), source, Task(seed=1)),
        _plan(model(), source, Task(num_samples=3)),
    }
    os.utime(path, (1, 1))
    plans.add(_plan(model(), open_input(path, model(), K), Task()))
    assert len(plans) == 5
    assert _plan(model(), source, Task()) in plans


def test_a_missing_model_and_a_wrong_name_are_told(
    project: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("npz", project, x)
    common = ["--data", str(path), "--model", "models:/none@champion", "--out"]
    with pytest.raises(UserError, match=r"there is no model models:/none@champion in MLflow's"):
        main([*common, str(project / "s.parquet")])
    assert list(project.glob("s.parquet*")) == []
    with pytest.raises(UserError, match=r"expected a name that ends in \.parquet"):
        main([*common, "scores.txt"])
    with pytest.raises(UserError, match=r"reports/register\.json is missing"):
        main(["--data", str(path), "--out", "s.parquet"])


def run(project: Path, *arguments: str, expect: int = 0) -> str:
    command = [sys.executable, "-m", "pipeline.score", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_folder_is_scored_as_by_the_served_model_and_a_killed_run_goes_on(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project)
    name = register(params, paths)["model_name"]
    x = np.concatenate([load_split(paths.prepared, part).x for part in ("train", "valid", "test")])
    folder = images(project / "images", x)
    arguments = ["--model", f"models:/{name}@champion", "--data", str(folder)]
    arguments += ["--out", "scores.parquet", "--num-samples", str(K), "--seed", "3"]
    parts = project / "scores.parquet.parts"

    command = [sys.executable, "-m", "pipeline.score", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=project, env=environment, start_new_session=True) as first:
        while len(list(parts.glob("*.parquet"))) < 2 and first.poll() is None:
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
    assert not (project / "scores.parquet").exists()
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert len(before) >= 2

    (folder / "0" / "003.png.tmp").touch()  # no image: not looked at
    told = run(project, *arguments)
    lines = told.splitlines()
    assert f"{len(x)} examples of {folder} by models:/{name}@champion; " in lines[0]
    assert "were done before" in lines[0]
    assert all(line.startswith("score      ") for line in lines), told
    assert "% below the 5th percentile of the validation data" in lines[-1]
    assert not parts.exists()

    found = pd.read_parquet(project / "scores.parquet")
    assert found["id"].tolist() == sorted(f"{n // 50}/{n:03d}.png" for n in range(len(x)))
    packed_model._use_store()
    served = packed_model.import_mlflow().pyfunc.load_model(f"models:/{name}/1")
    expected = served.predict(x, params={"num_samples": K, "seed": 3})
    assert found.columns.tolist() == ["id", *expected.columns]
    assert not found["reason"].notna().to_numpy().any()
    for column in expected.columns.drop("reason"):
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-5, atol=1e-5)

    assert "is there already, from this model and this data" in run(project, *arguments)
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(folder / "1" / "wrong.png")
    told = run(project, *arguments, expect=1)
    assert "wrong.png has shape (1, 5, 4)" in told
    assert "mend it, and the same command goes on" in told
    assert "Traceback" not in told
