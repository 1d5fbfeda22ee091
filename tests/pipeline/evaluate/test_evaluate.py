"""Evaluate on models whose log p(x) is known, and metrics.json recomputed from the examples."""

import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.evaluate import (
    Baseline,
    __main__ as evaluate,
    gallery,
    score_split,
    scoring,
    summarise,
)
from pipeline.params import EvaluateParams
from pipeline.stage import UserError, write_prepared
from tests.pipeline.builders import epoch_row, split, write_csv
from vae.evidence import EvidenceSettings, FactorAnalysis, settings as settings_module
from vae.models import VAE, VAEConfig, save

Proposal = Literal["encoder", "laplace", "refined"]
COUNTS = {"train": 200, "valid": 80, "test": 60}


def prepare(folder: Path, x: np.ndarray, space: str) -> None:
    """data/prepared with the examples `x` cut into the three splits."""
    folder.mkdir(parents=True)
    splits, start = {}, 0
    for name, count in COUNTS.items():
        rows = np.arange(start, start + count)
        splits[name] = split(x[rows], [f"x{i}" for i in rows], label=rows % 3)
        start += count
    write_prepared(
        folder,
        splits,
        dataset="toy",
        source="toy",
        space=space,
        binarization="static" if space == "binary" else None,
        duplicates={"all": 0, "across_splits": 0},
        own_test_split=False,
        num_classes=3,
    )


def run(folder: Path, model: VAE, x: np.ndarray, num_samples: int, **settings) -> dict:
    """The stage itself, without MLflow."""
    prepare(folder / "prepared", x, model.config.space)
    save(model, folder / "model")
    write_csv(folder / "train" / "history.csv", [epoch_row(epoch) for epoch in (1, 2, 3)])
    return again(folder, num_samples, **settings)


def again(
    folder: Path, num_samples: int, proposal: Proposal = "encoder", target_se: float | None = None
) -> dict:
    config = EvaluateParams(
        num_importance_samples=num_samples,
        target_se=target_se,
        proposal=proposal,
        precision="fp32",
        seed=0,
    )
    places = (folder / name for name in ("prepared", "model", "train", "evaluate"))
    return evaluate.evaluate(config, *places)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Linear-Gaussian data and the very model that made them: log p(x) is exact."""
    folder = tmp_path_factory.mktemp("table")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 2, generator=generator, dtype=torch.float64) * 3
    truth = FactorAnalysis(
        torch.arange(5, dtype=torch.float64), weight, torch.linspace(0.5, 2, 5).double()
    )
    x, _ = truth.sample(sum(COUNTS.values()), generator=generator)
    metrics = run(folder, truth.as_vae("continuous"), x.numpy(), num_samples=40)
    return folder, truth, x[-COUNTS["test"] :], metrics


def test_exact_model_has_exact_evidence(table):
    _, truth, test, metrics = table
    exact = truth.log_prob(test)
    assert metrics["log_px"] == pytest.approx(exact.mean().item(), abs=1e-7)
    assert metrics["elbo"] == pytest.approx(metrics["log_px"], abs=0.5)  # log p(x|z) is sampled
    assert metrics["log_px_mc_se"] == pytest.approx(0, abs=1e-6)
    assert metrics["ess_median"] == pytest.approx(40)
    assert metrics["khat_bad_fraction"] == 0
    assert metrics["ladder"].keys() == {"1", "10", "40"}
    assert all(v == pytest.approx(metrics["log_px"], abs=1e-7) for v in metrics["ladder"].values())
    assert (metrics["active_units"], metrics["latent_dim"]) == (2, 2)


def test_kl_is_the_closed_form(table):
    _, truth, test, metrics = table
    q = truth.posterior(test)
    expected = torch.distributions.kl_divergence(
        q, torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    )
    assert metrics["kl"] == pytest.approx(expected.mean().item(), abs=1e-7)
    assert metrics["elbo"] == pytest.approx(metrics["log_px_z"] - metrics["kl"], abs=1e-9)


def test_continuous_data_have_no_bits(table):
    metrics = table[3]
    assert metrics["bits_per_dim"] is None
    assert metrics["bits_per_dim_se"] is None
    assert metrics["baseline"]["bits_per_dim"] is None


def test_the_fitted_baseline_comes_close_to_the_truth_but_not_above_it(table):
    base = table[3]["baseline"]
    assert 0 < base["gain"] < 0.3  # 200 rows for about 20 parameters
    assert base["name"] == "factor analysis with 2 factors"


def test_metrics_follow_from_the_examples(table):
    folder, _, _, metrics = table
    rows = pd.read_parquet(folder / "evaluate" / "per_example.parquet")
    assert list(rows["id"]) == [f"x{i}" for i in range(280, 340)]
    assert list(rows["label"]) == [i % 3 for i in range(280, 340)]
    assert metrics["num_examples"] == len(rows) == 60
    assert metrics["log_px"] == pytest.approx(rows["log_px"].mean())
    assert metrics["log_px_se"] == pytest.approx(rows["log_px"].sem())
    assert metrics["posterior_gap"] == pytest.approx((rows["log_px"] - rows["elbo"]).mean())
    gain = rows["log_px"] - rows["baseline_log_px"]
    assert metrics["baseline"]["gain"] == pytest.approx(gain.mean())
    assert metrics["baseline"]["gain_se"] == pytest.approx(gain.sem())
    assert metrics["baseline"]["gain_in_se"] == pytest.approx(gain.mean() / gain.sem())
    assert metrics == json.loads((folder / "evaluate" / "metrics.json").read_text())


def test_reference_holds_the_validation_quantiles(table):
    folder, truth, _, _ = table
    found = json.loads((folder / "evaluate" / "reference.json").read_text())
    x = torch.from_numpy(np.array(evaluate.load_split(folder / "prepared", "valid").x))
    exact = truth.log_prob(x).numpy()
    assert (found["num_examples"], found["num_samples"], found["split"]) == (80, 40, "valid")
    np.testing.assert_allclose(
        found["log_px"], np.quantile(exact, found["probabilities"]), atol=1e-6
    )


def test_every_picture_is_there(table):
    names = {path.stem for path in (table[0] / "evaluate").glob("*.png")}
    assert names >= {
        "reconstructions", "samples", "traversals", "latent_space", "elbo_curves", "histogram",
        "ladder", "activity",
    }  # fmt: skip


def test_a_second_run_gives_the_same_figures(table):
    folder, _, _, metrics = table
    before = {p.name: p.read_bytes() for p in (folder / "evaluate").iterdir()}
    assert again(folder, 40) == metrics
    after = {p.name: p.read_bytes() for p in (folder / "evaluate").iterdir()}
    assert {name for name in before if before[name] != after[name]} == set()


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A one-dimensional latent variable, so that log p(x) is a one-dimensional integral."""
    folder = tmp_path_factory.mktemp("grey")
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=(1, 4, 4), space="grey8", likelihood="gaussian", latent_dim=1, hidden=(6,)
    )
    model = VAE(config)
    x = torch.randint(0, 256, (sum(COUNTS.values()), 1, 4, 4), dtype=torch.uint8)
    model.set_data_statistics(x.double().mean(0), x.double().std(0))
    with torch.no_grad():  # q(z|x) is the prior: a proposal that covers the posterior
        for value in model.encoder.output.parameters():
            value.zero_()
    metrics = run(folder, model, x.numpy(), num_samples=1000)
    return folder, model, x[-COUNTS["test"] :], metrics


def quadrature(model: VAE, x: torch.Tensor) -> np.ndarray:
    """log p(x) of each example (B,) by the trapezoidal rule over the one latent variable."""
    z = torch.linspace(-12, 12, 4801)[:, None]
    log_prior = model.prior().log_prob(z)
    with torch.no_grad():
        p_x = model.likelihood(z[:, None])
        joint = p_x.log_prob(x.float()).double() + log_prior[:, None].double()
    return (joint + math.log(24 / 4800)).logsumexp(0).numpy()


def test_log_px_equals_quadrature(grey):
    folder, model, test, metrics = grey
    exact = quadrature(model, test)
    rows = pd.read_parquet(folder / "evaluate" / "per_example.parquet")
    assert np.all(np.abs(rows["log_px"] - exact) < 5 * rows["se"] + 1e-3)
    assert abs(metrics["log_px"] - exact.mean()) < 4 * metrics["log_px_mc_se"] + 1e-3
    assert float(rows["se"].to_numpy().max()) < 0.5
    gap = exact.mean() - metrics["elbo"]
    assert metrics["posterior_gap"] == pytest.approx(gap, abs=4 * metrics["log_px_mc_se"] + 1e-3)


@pytest.mark.parametrize("proposal", ["laplace", "refined"])
def test_a_better_proposal_changes_the_error_and_nothing_else(grey, tmp_path, proposal):
    folder, model, test, metrics = grey
    for name in ("prepared", "model", "train"):
        (tmp_path / name).symlink_to(folder / name)
    found = again(tmp_path, 1000, proposal)
    rows = pd.read_parquet(tmp_path / "evaluate" / "per_example.parquet")
    exact = quadrature(model, test)
    assert np.all(np.abs(rows["log_px"] - exact) < 5 * rows["se"] + 1e-3)
    assert found["proposal"] == proposal
    assert found["log_px_mc_se"] < metrics["log_px_mc_se"] / 2
    assert metrics["elbo"] < found["proposal_elbo"] < found["log_px"]
    for name in ("kl", "active_units"):  # of the encoder, whatever the proposal
        assert found[name] == metrics[name]
    assert found["elbo"] == pytest.approx(metrics["elbo"], rel=0.01)
    reference = json.loads((tmp_path / "evaluate" / "reference.json").read_text())
    assert reference["proposal"] == proposal


def test_a_wanted_error_saves_samples_where_it_can_be_trusted(grey, tmp_path):
    folder, model, test, _ = grey
    for name in ("prepared", "model", "train"):
        (tmp_path / name).symlink_to(folder / name)
    found = again(tmp_path, 4000, "refined", target_se=0.05)
    rows = pd.read_parquet(tmp_path / "evaluate" / "per_example.parquet")
    assert np.all(np.abs(rows["log_px"] - quadrature(model, test)) < 5 * rows["se"] + 1e-3)
    early = rows[rows["samples"] < 4000]
    assert len(early) > len(rows) / 2
    assert np.all(early["se"] <= 0.05)
    assert found["samples_mean"] == pytest.approx(rows["samples"].to_numpy().mean())
    assert found["num_samples"] == 4000
    assert found["ladder"]["4000"] == pytest.approx(found["log_px"])
    reference = json.loads((tmp_path / "evaluate" / "reference.json").read_text())
    assert reference["target_se"] == found["target_se"] == 0.05


def test_an_encoder_that_ignores_x_is_called_collapsed(grey):
    metrics = grey[3]
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["active_units"] == 0
    assert "collapse" in metrics["collapse"]


def test_bits_are_nats_over_dimensions(grey):
    metrics = grey[3]
    for entry in (metrics, metrics["baseline"]):
        expected = -entry["log_px"] / (16 * math.log(2))
        assert entry["bits_per_dim"] == pytest.approx(expected, rel=1e-12)
    assert metrics["bits_per_dim_se"] == pytest.approx(metrics["log_px_se"] / (16 * math.log(2)))


def test_uniform_noise_costs_eight_bits(grey):
    """No model can beat 8 bits on uniform noise; this one and its baseline stay close to it."""
    metrics = grey[3]
    assert 8 < metrics["baseline"]["bits_per_dim"] < 9
    assert 8 < metrics["bits_per_dim"] < 12


def test_batches_are_only_a_matter_of_memory(grey, monkeypatch):
    """Every example is scored once, in order, whatever the batch size."""
    _, model, test, _ = grey
    monkeypatch.setitem(settings_module.BATCH_VALUES, "cpu", 16 * 7)
    small = score_split(model, test, EvidenceSettings(num_samples=1000, seed=1))
    monkeypatch.setitem(settings_module.BATCH_VALUES, "cpu", 16 * 60)
    large = score_split(model, test, EvidenceSettings(num_samples=1000, seed=1))
    error = np.hypot(small.se, large.se)
    assert (np.abs(small.log_px - large.log_px) < 5 * error).all()
    assert np.corrcoef(small.log_px, large.log_px)[0, 1] > 0.98
    np.testing.assert_array_equal(small.kl, large.kl)


def test_binary_has_both_baselines_and_the_stronger_one_first(tmp_path):
    torch.manual_seed(0)
    x = (torch.rand(sum(COUNTS.values()), 1, 3, 3) < 0.3).to(torch.uint8)
    config = VAEConfig(
        data_shape=(1, 3, 3), space="binary", likelihood="bernoulli", latent_dim=2, hidden=(6,),
        posterior="flow", prior="vamp",
    )  # fmt: skip
    metrics = run(tmp_path, VAE(config), x.numpy(), num_samples=8)
    scores = {name: entry["log_px"] for name, entry in metrics["baselines"].items()}
    assert len(scores) == 2
    assert metrics["baseline"]["log_px"] == max(scores.values())
    assert metrics["khat_median"] is None  # too few samples
    assert metrics["khat_bad_fraction"] is None
    assert metrics["kl"] == pytest.approx(metrics["log_px_z"] - metrics["elbo"])


def test_a_failure_leaves_the_old_results(table, monkeypatch):
    folder = table[0]
    before = {p.name: p.read_bytes() for p in (folder / "evaluate").iterdir()}

    def fail(*args):
        raise RuntimeError("disk full")

    monkeypatch.setattr(gallery, "draw", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        again(folder, 5)
    assert {p.name: p.read_bytes() for p in (folder / "evaluate").iterdir()} == before
    assert not list(folder.glob(".evaluate*"))


def test_damaged_weights_are_refused(grey, tmp_path):
    folder = grey[0]
    copy = tmp_path / "model"
    copy.mkdir()
    for path in (folder / "model").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"dvc repro --force train"):
        evaluate.evaluate(
            EvaluateParams(
                num_importance_samples=5,
                target_se=None,
                proposal="encoder",
                precision="fp32",
                seed=0,
            ),
            folder / "prepared", copy, folder / "train", tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_data_is_refused(grey, table, tmp_path):
    with pytest.raises(UserError, match=r"made for continuous data of shape \(5,\).*are grey8"):
        evaluate.evaluate(
            EvaluateParams(
                num_importance_samples=5,
                target_se=None,
                proposal="encoder",
                precision="fp32",
                seed=0,
            ),
            grey[0] / "prepared", table[0] / "model", grey[0] / "train", tmp_path / "out",
        )  # fmt: skip


def evidence_of(values: list[float], khat: list[float]) -> scoring.SplitEvidence:
    column = np.array(values)
    return scoring.SplitEvidence(
        log_px=column, se=np.full(len(values), 0.3), ess=column + 200, khat=np.array(khat),
        samples=np.full(len(values), 100),
        proposal_elbo=column - 0.5, elbo=column - 1,
        log_px_z=column + 2, kl=np.full(len(values), 3.0), ladder={1: column - 1, 100: column},
    )  # fmt: skip


def test_summary_of_known_figures():
    evidence = evidence_of([-100.0, -104.0, -102.0, -98.0], [0.2, 0.9, 0.4, math.nan])
    baseline = Baseline(name="b", log_px=torch.tensor([-110.0, -112.0, -114.0, -104.0]).double())
    found = summarise(evidence, [baseline], space="grey8", num_values=10)
    assert found["log_px"] == -101
    assert found["log_px_se"] == pytest.approx(math.sqrt((1 + 9 + 1 + 9) / 3 / 4))
    assert found["log_px_mc_se"] == pytest.approx(0.3 * math.sqrt(4) / 4)
    assert found["khat_median"] == pytest.approx(0.4)
    assert found["khat_bad_fraction"] == pytest.approx(1 / 3)
    assert found["posterior_gap"] == 1
    assert found["proposal_elbo"] == -101.5
    assert found["ladder"] == {"1": -102, "100": -101}
    assert found["baseline"]["gain"] == 9  # of 10, 8, 12 and 6
    assert found["baseline"]["gain_se"] == pytest.approx(math.sqrt(20 / 3 / 4))
    assert "baselines" not in found


def broken(*arguments, **options):
    raise MemoryError("no room for it")


@pytest.mark.parametrize(
    ("module", "name", "lost"),
    [
        ("pipeline.evaluate.__main__", "fit_baselines", "baseline"),
        ("pipeline.figures.panels", "activity_figure", "activity.png"),
        ("pipeline.figures.panels", "table_samples", "samples.png"),
        ("pipeline.figures.plots", "ladder_figure", "ladder.png"),
        ("pipeline.evaluate.shifted_data", "compare", "shifted data"),
    ],
)
def test_what_fails_beside_the_figures_costs_itself_only(
    module, name, lost, tmp_path, monkeypatch, capsys
):
    x = np.random.default_rng(0).normal(size=(340, 3))
    fa = FactorAnalysis.fit(torch.from_numpy(x), 1)
    whole = run(tmp_path, fa.as_vae(), x, 50)
    capsys.readouterr()
    monkeypatch.setattr(f"{module}.{name}", broken)
    found = again(tmp_path, 50)
    assert f"warning: no {lost} (MemoryError: no room for it)" in capsys.readouterr().out
    same = {key for key in whole if key not in ("baseline", "shifted")}
    assert {key: found[key] for key in same} == {key: whole[key] for key in same}
    if name == "fit_baselines":
        assert found["baseline"]["gain"] is None
    pictures_there = {path.name for path in (tmp_path / "evaluate").glob("*.png")}
    assert (lost in pictures_there) is False
    assert len(pictures_there) >= 7


def test_an_example_that_can_not_be_scored_is_counted_and_in_no_mean(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(340, 3))
    fa = FactorAnalysis.fit(torch.from_numpy(x), 1)
    model = fa.as_vae().float()
    x[-1] = 1e90
    found = run(tmp_path, model, x, 50)
    assert (found["num_examples"], found["num_unscored"]) == (59, 1)
    table = pd.read_parquet(tmp_path / "evaluate" / "per_example.parquet")
    assert table["reason"].notna().tolist() == [False] * 59 + [True]
    assert found["log_px"] == pytest.approx(table["log_px"][:59].mean(), rel=1e-9)
    assert "1 test examples have no log p(x), and are in no mean" in capsys.readouterr().out
    json.loads((tmp_path / "evaluate" / "metrics.json").read_text(), parse_constant=pytest.fail)
