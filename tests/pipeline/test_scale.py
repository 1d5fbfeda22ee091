"""A table in any unit, from the file to the figures: log p(x) + log s is what it was."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.evaluate import evaluate
from pipeline.params import EvaluateParams
from pipeline.prepare import prepare
from pipeline.stage import load_split
from tests.pipeline import builders
from vae import VAE, VAEConfig, save
from vae.data import statistics_of

SETTINGS = EvaluateParams(
    num_importance_samples=400, target_se=None, proposal="refined", precision="fp32", seed=0
)


def evaluated(folder: Path, scale: float, offset: float = 0.0) -> tuple[float, float]:
    """Mean log p(x) of the model and of its baseline on the test split."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=200)
    table = pd.DataFrame({"a": z, "b": z + 0.3 * rng.normal(size=200), "c": rng.gamma(2, size=200)})
    folder.mkdir()
    (scale * table + offset).assign(who=[f"{i}" for i in range(200)]).to_csv(folder / "t.csv")
    data = replace(builders.TABLE, root=str(folder / "t.csv"), id="who", group="who")
    prepare(replace(data, valid_fraction=0.2, test_fraction=0.2), folder / "prepared")
    train = torch.from_numpy(np.array(load_split(folder / "prepared", "train").x))
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=(3,), space="continuous", latent_dim=1, likelihood="gaussian", hidden=(8,)
    )
    model = VAE(config)
    model.set_data_statistics(*statistics_of([train], binarize=False))
    save(model.eval(), folder / "model")
    rows = [builders.epoch_row(epoch) for epoch in (1, 2)]
    builders.write_csv(folder / "train" / "history.csv", rows)
    found = evaluate(
        SETTINGS, folder / "prepared", folder / "model", folder / "train", folder / "evaluate"
    )
    assert len(list((folder / "evaluate").glob("*.png"))) == 8
    return found["log_px"], found["baseline"]["log_px"]


@pytest.fixture(scope="module")
def as_it_is(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    return evaluated(tmp_path_factory.mktemp("scale") / "one", 1.0)


@pytest.mark.parametrize(("scale", "offset"), [(1e-30, 0), (1e20, 0), (1.0, 1e9)])
def test_figures_move_by_the_logarithm_of_the_unit(
    tmp_path: Path,
    scale: float,
    offset: float,
    as_it_is: tuple[float, float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_px, baseline = as_it_is
    moved, moved_baseline = evaluated(tmp_path / "other", scale, offset)
    jacobian = 3 * math.log(scale)
    # the noise is of an example's content, so the estimates differ by their Monte-Carlo error
    assert moved + jacobian == pytest.approx(log_px, abs=0.02)
    assert moved_baseline + jacobian == pytest.approx(baseline, abs=1e-4)
    assert "warning: no" not in capsys.readouterr().out
