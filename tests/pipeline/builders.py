"""Small stage outputs in the files' real formats, for tests of what reads them."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.evaluate import reference, score_split
from pipeline.params import DataParams
from pipeline.prepare import content_hashes
from pipeline.register import Paths
from pipeline.stage import Split, load_split, write_prepared
from vae.evidence import EvidenceSettings
from vae.models import VAE, VAEConfig, save

DATA = DataParams(
    source="mnist5k",
    root="data/own",
    space="grey8",
    binarization="dynamic",
    size=None,
    channels=None,
    columns=None,
    missing="refuse",
    id=None,
    label=None,
    group=None,
    valid_fraction=0.1,
    test_fraction=0.2,
    seed=0,
    limit=None,
)
TABLE = replace(DATA, source="table", space="continuous")
STARTED = 1_700_000_000.0
EPOCHS = 5


def params(
    *,
    uri: str | None = None,
    promote: bool | None = None,
    experiment: str = "tightbound",
    **evaluate: int,
) -> Any:
    """The sections of `Params` that tracking and registration read."""
    return SimpleNamespace(
        tracking=SimpleNamespace(experiment=experiment, uri=uri),
        data=SimpleNamespace(size=None, channels=None),
        register=SimpleNamespace(promote=promote),
        evaluate=SimpleNamespace(**{"num_importance_samples": 50, "seed": 0} | evaluate),
    )


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def run_facts(name: str, **flat: Any) -> dict[str, Any]:
    """run.json."""
    return {
        "name": name,
        "started": STARTED,
        "finished": STARTED + 100,
        "params": flat,
        "data_hash": "d" * 64,
        "stage_hash": hashlib.sha256(name.encode()).hexdigest(),
    }


def sweep_outputs(folder: Path, name: str = "sweep-0001") -> Path:
    """reports/sweep: two trials that worked and one that failed."""
    rows = [
        {
            "trial_id": f"t{latent_dim}",
            "point": latent_dim // 2,
            "latent_dim": latent_dim,
            "likelihood": "discretized_logistic",
            "seed": 0,
            "status": "ok",
            "error": "",
            "epochs": 3,
            "valid_elbo": -100.0 - latent_dim,
            "valid_log_px": -95.0 - latent_dim,
            "valid_log_px_se": 0.5,
            "valid_bits_per_dim": 2.0 + latent_dim / 100,
            "valid_bits_per_dim_se": 0.01,
            "khat_bad_fraction": 0.0,
            "num_samples": 50,
            "seconds": 10.5,
        }
        for latent_dim in (2, 4)
    ]
    failed = dict.fromkeys(rows[0], "")
    failed |= {"trial_id": "t8", "point": 3, "latent_dim": 8, "likelihood": "gaussian", "seed": 0}
    failed |= {"status": "diverged", "error": "loss became NaN"}
    write_csv(folder / "trials.csv", [*rows, failed])
    only_trials = ("seed", "error", "epochs", "num_samples")
    points = [
        {key: value for key, value in row.items() if key not in only_trials}
        | {"rank": rank, "num_seeds": 1}
        | dict.fromkeys(("valid_log_px_seed_se", "valid_bits_per_dim_seed_se"), "")
        for rank, row in zip((1, 2, ""), [*rows, failed], strict=True)
    ]
    write_csv(folder / "points.csv", points)
    model = {"data_shape": [1, 4, 4], "space": "grey8"}
    best = {"model": model, "selected_by": "valid_bits_per_dim", "score": 2.02, "trial_id": "t2"}
    write_json(folder / "best.json", best)
    write_json(folder / "run.json", run_facts(name, **{"scheduler": "none", "points": [[2], [4]]}))
    (folder / "sweep.png").write_bytes(b"a picture")
    return folder


def epoch_row(epoch: int) -> dict[str, Any]:
    """A row of history.csv; its ELBO rises by one nat an epoch."""
    return {
        "epoch": epoch,
        "time": STARTED + 10 * epoch,
        "seconds": 10.0,
        "images_per_s": 1000.0,
        "learning_rate": 1e-3,
        "beta": 1.0,
        "train_elbo": -99.0 + epoch,
        "train_log_px_z": -90.0 + epoch,
        "train_kl": 9.0,
        "valid_elbo": -101.0 + epoch,
        "valid_log_px_z": -92.0 + epoch,
        "valid_kl": 9.0,
        "is_best": True,
    }


def train_outputs(
    folder: Path, model: Path, name: str = "train-0001", epochs: int = EPOCHS
) -> Path:
    """reports/train, with the name that its run is known by; `model` must be there already."""
    config = json.loads((model / "config.json").read_text())["model"]
    write_csv(folder / "history.csv", [epoch_row(epoch) for epoch in range(1, epochs + 1)])
    write_json(folder / "metrics.json", {"epochs": epochs, "best_epoch": epochs, "num_workers": 2})
    flat = {f"model.{key}": value for key, value in config.items()} | {"training.epochs": epochs}
    write_json(folder / "run.json", run_facts(name, **flat))
    return folder


def model_stub(folder: Path) -> Path:
    """A model folder for tests that read its config only."""
    config = {"data_shape": [1, 4, 4], "likelihood": "discretized_logistic", "latent_dim": 2}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    write_json(folder / "config.json", {"format": 1, "weights_sha256": digest, "model": config})
    return folder


def evaluate_metrics(**changes: Any) -> dict[str, Any]:
    """reports/evaluate/metrics.json."""
    return {
        "num_examples": 40,
        "num_samples": 50,
        "elbo": -100.0,
        "log_px_z": -91.0,
        "kl": 9.0,
        "log_px": -97.5,
        "log_px_se": 1.25,
        "log_px_mc_se": 0.05,
        "bits_per_dim": 8.79,
        "bits_per_dim_se": 0.11,
        "ess_median": 20.0,
        "khat_median": 0.3,
        "khat_bad_fraction": 0.05,
        "posterior_gap": 2.5,
        "active_units": 2,
        "latent_dim": 2,
        "collapse": "none: 2 of 2 units are active",
        "ladder": {"1": -100.0, "10": -98.5, "50": -97.5},
        "baseline": {"name": "factor analysis", "log_px": -120.0, "gain": 22.5, "gain_se": 1.5},
        "shifted": {"inverted": {"log_px": -300.0, "auroc": 0.97, "num_examples": 40}},
    } | changes


SHAPE = (1, 4, 4)


def split(x: np.ndarray, ids: list[str], label: np.ndarray | None = None) -> Split:
    """A split without labels, unless some are given; `content` as prepare makes it."""
    label = np.full(len(x), -1) if label is None else label
    return Split(x=x, label=label, id=np.array(ids), content=content_hashes(x, None))


def prepared_data(folder: Path, *, seed: int = 0, more_test: np.ndarray | None = None) -> Any:
    """data/prepared: grey 4x4 images around 60 or 180, with ids that count up; 40 for the test.

    more_test: x that the test split begins with.
    """
    rng = np.random.default_rng(seed)
    splits, start = {}, 0
    for name, count in (("train", 100), ("valid", 60), ("test", 40)):
        level = rng.choice([60.0, 180.0], size=(count, 1, 1, 1))
        x = np.clip(np.rint(level + 15 * rng.standard_normal((count, *SHAPE))), 0, 255)
        x = x.astype(np.uint8)
        if name == "test" and more_test is not None:
            x = np.concatenate([more_test, x])
        splits[name] = split(x, [f"image-{start + i}" for i in range(len(x))])
        start += len(x)
    folder.mkdir(parents=True)
    facts = {"dataset": "blobs", "source": "test", "space": "grey8", "binarization": None}
    facts |= {"duplicates": {}, "own_test_split": False, "num_classes": None}
    return write_prepared(folder, splits, **facts)


def untrained_model(
    folder: Path, prepared: Path, *, seed: int = 0, start_at_mean: bool = True
) -> VAE:
    """A model with its first weights; without the data's mean as its start it is much worse."""
    torch.manual_seed(seed)
    config = VAEConfig(
        data_shape=SHAPE,
        space="grey8",
        latent_dim=2,
        likelihood="discretized_logistic",
        hidden=(8,),
    )
    model = VAE(config).eval()
    if start_at_mean:
        x = torch.tensor(load_split(prepared, "train").x).float()
        model.set_data_statistics(x.mean(0), x.std(0))
    save(model, folder)
    return model


def evaluate_outputs(
    folder: Path,
    prepared: Path,
    model: VAE,
    *,
    num_samples: int = 50,
    **changes: Any,
) -> Path:
    """reports/evaluate with real evidence; `changes` to its metrics."""
    test = load_split(prepared, "test")
    settings = EvidenceSettings(num_samples=num_samples)
    found = score_split(model, torch.tensor(test.x), settings)
    valid = torch.tensor(load_split(prepared, "valid").x)
    quantiles = reference(score_split(model, valid, settings))
    write_json(folder / "reference.json", quantiles | settings.to_dict())
    table = pd.DataFrame({"id": test.id, "log_px": found.log_px, "se": found.se})
    table.to_parquet(folder / "per_example.parquet")
    log_px = float(found.log_px.mean())
    metrics = evaluate_metrics(num_samples=num_samples, log_px=log_px, **changes)
    write_json(folder / "metrics.json", metrics)
    return folder


def pipeline_outputs(
    folder: Path, *, name: str = "train-0001", start_at_mean: bool = True, seed: int = 0, **kw: Any
) -> Paths:
    """All that the register stage reads, around an existing `folder/data`."""
    paths = Paths(
        prepared=folder / "data",
        selfcheck=write_json(folder / "selfcheck.json", {"passed": True, "checks": []}),
        sweep=folder / "sweep",
        model=folder / "model",
        train=folder / "train",
        evaluate=folder / "evaluate",
    )
    if not paths.prepared.exists():
        prepared_data(paths.prepared)
    sweep_outputs(paths.sweep)
    model = untrained_model(paths.model, paths.prepared, seed=seed, start_at_mean=start_at_mean)
    train_outputs(paths.train, paths.model, name=name)
    evaluate_outputs(paths.evaluate, paths.prepared, model, **kw)
    return paths
