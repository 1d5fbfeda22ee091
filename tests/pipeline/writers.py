"""Every writer of the project, to be killed at each system call: `python writers.py NAME FOLDER`.

Prints how often it was killed; fails where what is left then is anything but the old or the new,
or where the same call does not bring the new and nothing beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.cluster import storage_at
from pipeline.score import __main__ as score, write_part
from pipeline.stage import load_split, write_json, write_prepared
from tests.killing import at_every_system_call
from tests.pipeline import builders
from vae.models import VAE, VAEConfig, load, save
from vae.system import whole_directory

Writer = tuple[Callable[[], object], Callable[[], object], Callable[[], object]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def part(folder: Path) -> Writer:
    """One of two parts of an answer, and what is made of them."""
    parts, out = folder / "parts", folder / "s.parquet"
    rows = pd.DataFrame({"id": ["a", "b", "c"], "log_px": [1.0, 2.0, 3.0]})

    def prepare() -> None:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        write_part(parts / "000000-000000.parquet", rows.assign(id=["x", "y", "z"]), "plan")

    def work() -> None:
        write_part(parts / "000000-000001.parquet", rows, "plan")

    def check() -> None:
        done = score._finished(parts, "plan")
        assert set(done.values()) == {3}, done
        assert "000000-000000" in done
        if "000000-000001" not in done:
            work()
        assert score._assemble(parts, out, "plan") == 6
        assert pd.read_parquet(out)["id"].tolist() == ["x", "y", "z", "a", "b", "c"]
        left = {"000000-000000.parquet", "000000-000001.parquet", "plan.json"}
        assert set(names(parts)) == left, names(parts)

    return prepare, work, check


def result(folder: Path) -> Writer:
    """The whole answer, from its parts."""
    prepare_part, work_part, _ = part(folder)
    parts, out = folder / "parts", folder / "s.parquet"

    def prepare() -> None:
        prepare_part()
        work_part()
        out.unlink(missing_ok=True)

    def work() -> None:
        score._assemble(parts, out, "plan")

    def check() -> None:
        if out.exists():
            assert len(pq.read_table(out)) == 6
        work()
        assert len(pq.read_table(out)) == 6
        assert names(folder) == ["parts", "s.parquet"], names(folder)

    return prepare, work, check


def as_json(folder: Path) -> Writer:
    path = folder / "a.json"

    def check() -> None:
        assert json.loads(path.read_text()) in ({"old": 1}, {"new": [1] * 900})
        write_json(path, {"new": [1] * 900})
        assert json.loads(path.read_text()) == {"new": [1] * 900}
        assert names(folder) == ["a.json"], names(folder)

    return (
        lambda: write_json(path, {"old": 1}),
        lambda: write_json(path, {"new": [1] * 900}),
        check,
    )


def record(folder: Path) -> Writer:
    """A record of a sweep's journal, in the storage of Ray's runs."""
    storage = storage_at(str(folder))

    def check() -> None:
        assert storage.read("a.json") in ({"old": 1}, {"new": [1] * 900})
        storage.write("a.json", {"new": [1] * 900})
        assert storage.read("a.json") == {"new": [1] * 900}

    return (
        lambda: storage.write("a.json", {"old": 1}),
        lambda: storage.write("a.json", {"new": [1] * 900}),
        check,
    )


def model(folder: Path) -> Writer:
    def made(latent_dim: int) -> VAE:
        torch.manual_seed(0)
        config = VAEConfig(
            data_shape=(2,), space="continuous", latent_dim=latent_dim, likelihood="gaussian",
            hidden=(2,),
        )  # fmt: skip
        return VAE(config)

    old, new = made(1), made(2)

    def check() -> None:
        assert load(folder / "vae").config.latent_dim in (1, 2)
        save(new, folder / "vae")
        assert load(folder / "vae").config.latent_dim == 2
        assert names(folder) == ["vae"], names(folder)

    return lambda: save(old, folder / "vae"), lambda: save(new, folder / "vae"), check


def prepared(folder: Path) -> Writer:
    facts: dict[str, Any] = {"dataset": "d", "source": "test", "space": "grey8"}
    facts |= {"binarization": None, "duplicates": {}, "own_test_split": False}
    facts |= {"num_classes": None}

    def write(count: int) -> None:
        x = np.zeros((count, 1, 2, 2), np.uint8)
        part = builders.split(x, [str(i) for i in range(count)])
        with whole_directory(folder / "data") as fresh:
            write_prepared(fresh, dict.fromkeys(("train", "valid", "test"), part), **facts)

    def check() -> None:
        assert len(load_split(folder / "data", "train")) in (2, 3)
        write(3)
        for split in ("train", "valid", "test"):
            assert len(load_split(folder / "data", split)) == 3
        assert names(folder) == ["data"], names(folder)

    return lambda: write(2), lambda: write(3), check


WRITERS = {
    "part": part,
    "result": result,
    "json": as_json,
    "record": record,
    "model": model,
    "prepared": prepared,
}

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    prepare, work, check = WRITERS[sys.argv[1]](Path(sys.argv[2]))
    prepare()
    work()
    check()  # all is imported before the first fork
    print(at_every_system_call(prepare, work, check, every=int(sys.argv[3])))
