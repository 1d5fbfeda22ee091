"""Report stage: one self-contained page about the model and the evidence for it.

Reads what the other stages wrote: data/prepared/meta.json, reports/selfcheck.json,
reports/sweep, reports/train, reports/evaluate, reports/register.json.
Writes reports/report.html: no scripts, no requests, pictures inside; light and dark.
"""

from __future__ import annotations

import argparse
import base64
import math
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from pipeline import plots
from pipeline.stage import UserError, read_json, run_stage, say, whole_file

TEMPLATE = "report_template.html"
PICTURES = {
    "reconstructions.png": (
        "Reconstructions",
        "Test examples and the mean of p(x|z) at their encoder's posterior mean.",
    ),
    "samples.png": (
        "Samples from the prior",
        "z from p(z): the mean of p(x|z), and a draw of x from it, noise included.",
    ),
    "traversals.png": (
        "Latent traversals",
        "One latent dimension at a time, 3 standard deviations of the aggregate posterior to each "
        "side of one test example; the dimensions that vary most over the test split.",
    ),
    "latent_space.png": (
        "Latent space",
        "Posterior means of the test split, coloured by a label that the model never saw.",
    ),
    "extremes.png": (
        "Least and most likely",
        "The test examples with the lowest and the highest log p(x), in nats.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything the page is made of, as read from the other stages' files."""

    meta: dict[str, Any]
    selfcheck: dict[str, Any]
    trials: pd.DataFrame
    best: dict[str, Any]
    sweep_run: dict[str, Any]
    train_metrics: dict[str, Any]
    history: pd.DataFrame
    train_run: dict[str, Any]
    metrics: dict[str, Any]
    examples: pd.DataFrame
    pictures: dict[str, str]
    register: dict[str, Any]

    @property
    def unit(self) -> str:
        """Of the sweep: bits/dim in `grey8`, else nats."""
        return "bits/dim" if self.meta["space"] == "grey8" else "nats"


def read_inputs(
    prepared: Path, selfcheck: Path, sweep: Path, train: Path, evaluate: Path, register: Path
) -> Inputs:
    """Read the stages' files; raises UserError naming the first that is missing or damaged."""
    pictures = {
        name: _data_uri(evaluate / name) for name in PICTURES if (evaluate / name).is_file()
    }
    return Inputs(
        meta=read_json(prepared / "meta.json"),
        selfcheck=read_json(selfcheck),
        trials=_read_table(sweep / "trials.csv"),
        best=read_json(sweep / "best.json"),
        sweep_run=read_json(sweep / "run.json"),
        train_metrics=read_json(train / "metrics.json"),
        history=_read_table(train / "history.csv"),
        train_run=read_json(train / "run.json"),
        metrics=read_json(evaluate / "metrics.json"),
        examples=_read_table(evaluate / "per_example.parquet"),
        pictures=pictures,
        register=read_json(register),
    )


def render(inputs: Inputs) -> str:
    """Return the page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = resources.files("pipeline").joinpath(TEMPLATE).read_text(encoding="utf-8")
    champion = inputs.register.get("alias") == "champion"
    return environment.from_string(source).render(
        title=f"{inputs.meta['dataset']} ({inputs.meta['space']}): VAE report",
        dataset=f"{inputs.meta['dataset']}, {inputs.meta['space']}",
        champion=champion,
        badge=_badge(inputs.register),
        verdict=verdict(inputs),
        reasons=inputs.register.get("reasons", []),
        tiles=_tiles(inputs),
        sweep=_sweep(inputs),
        training=_training(inputs),
        evidence=_evidence(inputs),
        collapse=_collapse(inputs),
        pictures=[
            {"title": PICTURES[name][0], "caption": PICTURES[name][1], "svg": "", "uri": uri}
            for name, uri in inputs.pictures.items()
        ],
        selfcheck=_selfcheck(inputs.selfcheck),
        card=_card(inputs),
        loading=_loading(inputs),
        loading_note=(
            "The model loads offline, without this project, wherever its pinned requirements are "
            "installed; tasks are score, encode, decode, reconstruct and sample."
        ),
        limits=_limits(inputs),
        provenance=_provenance(inputs),
    )


def verdict(inputs: Inputs) -> str:
    """The page's first sentence: what the model is, how good it is, and by how many errors."""
    metrics, register = inputs.metrics, inputs.register
    name = register.get("model_name", "this model")
    number_ = register.get("version")
    which = f"{name}, version {number_}," if number_ is not None else f"{name}"
    if register.get("alias") == "champion":
        start = f"{which} is the champion"
    elif number_ is not None:
        start = f"{which} is a challenger, not the champion"
    else:
        start = f"{which} is not registered"
    score = f"log p(x) = {_nats(metrics['log_px'], metrics['log_px_se'])} nats"
    if metrics["bits_per_dim"] is not None:
        score += f" ({_bits(metrics['bits_per_dim'], metrics['bits_per_dim_se'])} bits/dim)"
    base = metrics["baseline"]
    direction = "better" if base["gain"] >= 0 else "worse"
    compared = (
        f"{_number(abs(base['gain']), 1)} nats {direction} than {base['name']}"
        f", {_number(abs(base['gain_in_se']), 1)} standard errors of the paired difference"
    )
    return f"{start}: {score} on {metrics['num_examples']:,} test examples, {compared}."


# --- sections ------------------------------------------------------------------------------------


def _badge(register: dict[str, Any]) -> str:
    if register.get("version") is None:
        return "not registered"
    return f"{register.get('alias') or 'registered'} · version {register['version']}"


def _tiles(inputs: Inputs) -> list[dict[str, str]]:
    metrics = inputs.metrics
    base = metrics["baseline"]
    tiles = [("log p(x), nats per example, ± SE across examples", _nats_of(metrics))]
    if metrics["bits_per_dim"] is not None:
        tiles.append(("bits/dim, ± SE", _bits(metrics["bits_per_dim"], metrics["bits_per_dim_se"])))
    tiles += [
        ("nats better than the baseline, ± paired SE", _gain(base)),
        ("active latent units", f"{metrics['active_units']} of {metrics['latent_dim']}"),
        ("Monte-Carlo error of the mean, nats", _number(metrics["log_px_mc_se"], 3)),
        ("estimates with khat above 0.7", _percent(metrics["khat_bad_fraction"])),
    ]
    return [{"words": words, "value": value} for words, value in tiles]


def _sweep(inputs: Inputs) -> dict[str, Any]:
    trials, unit = inputs.trials, inputs.unit
    if unit == "bits/dim":
        score, error, digits = trials["valid_bits_per_dim"], trials["valid_bits_per_dim_se"], 4
    else:
        score, error, digits = -trials["valid_log_px"], trials["valid_log_px_se"], 2
    shown = trials.assign(score=score, score_se=error).sort_values("score", na_position="last")
    chosen = inputs.best["model"]
    rows = [
        {
            "latent": row["latent_dim"],
            "likelihood": row["likelihood"],
            "score": f"{_number(row['score'], digits)} ± {_number(row['score_se'], digits)}"
            if row["status"] == "ok"
            else row["status"],
            "elbo": _number(row["valid_elbo"], 1),
            "khat": _percent(row["khat_bad_fraction"]),
            "best": str(row["trial_id"]) == str(inputs.best.get("trial_id")),
        }
        for row in shown.to_dict("records")
    ]
    failures = [
        f"{row['likelihood']}, latent dimension {row['latent_dim']}: {row['error']}"
        for row in trials[trials["status"] == "failed"].to_dict("records")
    ]
    samples = trials["num_samples"].dropna()
    if len(samples):
        words = (
            f"{len(trials)} trials, ranked by the importance-sampled log p(x) of the validation "
            f"split (K = {int(samples.iloc[0]):,}) in one unit for all likelihoods; chosen: "
            f"{chosen['likelihood']}, latent dimension {_size(chosen['latent_dim'])}."
        )
    else:
        words = (
            "Nothing was swept: params.yaml pins the likelihood to "
            f"{chosen['likelihood']} and the latent dimension to {_size(chosen['latent_dim'])}."
        )
    figure = _drawing(
        plots.sweep_figure(trials, unit),
        "sweep",
        "Latent dimension by likelihood",
        "Bars: 1 standard error of the mean across validation examples. The same examples score "
        "every trial, so differences between trials are surer than the bars suggest.",
    )
    return {"words": words, "unit": unit, "rows": rows, "failures": failures, "figure": figure}


def _training(inputs: Inputs) -> dict[str, Any]:
    facts = inputs.train_metrics
    words = (
        f"{facts['epochs']} epochs in {_duration(facts['seconds'])} on {facts['num_workers']} "
        f"data-parallel worker{'s' if facts['num_workers'] != 1 else ''} "
        f"({facts['images_per_s']:,.0f} examples/s); the weights of epoch {facts['best_epoch']} "
        f"are kept: validation ELBO {_number(facts['valid_elbo'], 2)} nats."
    )
    figures = [
        _drawing(plots.curve_figure(inputs.history, column), f"curve-{column}", title)
        for column, title in plots.CURVES
    ]
    return {"words": words, "figures": figures}


def _evidence(inputs: Inputs) -> dict[str, Any]:
    metrics, examples = inputs.metrics, inputs.examples
    samples = metrics["num_samples"]
    words = (
        f"log p(x) is estimated by importance sampling with K = {samples:,} draws from the encoder "
        "for each example; in expectation it is a lower bound. Two errors, never mixed: that of "
        f"the mean across examples ({_number(metrics['log_px_se'], 2)} nats) and the Monte-Carlo "
        f"error of the mean ({_number(metrics['log_px_mc_se'], 3)} nats)."
    )
    baseline = examples["baseline_log_px"].to_numpy()
    figures = [
        _drawing(
            plots.log_px_figure(examples["log_px"].to_numpy(), baseline),
            "log-px",
            "log p(x) of the test examples",
            f"The baseline is {metrics['baseline']['name']}.",
        ),
        _drawing(
            plots.ladder_figure(metrics["ladder"], metrics["elbo"]),
            "ladder",
            "What the bound gains with K",
            f"The ELBO loses {_number(metrics['posterior_gap'], 2)} nats to the encoder: the "
            "posterior gap, KL(q(z|x) ‖ p(z|x)) as far as K samples can tell.",
        ),
        _drawing(
            plots.ess_figure(examples["ess"].to_numpy(), samples),
            "ess",
            "Effective sample size",
            "How many of the K draws carry the estimate.",
        ),
        _drawing(
            plots.khat_figure(examples["khat"].to_numpy()),
            "khat",
            "Tail of the importance weights",
            "Above 0.7 an estimate and its error are not to be trusted: too few draws, "
            "or an encoder too narrow.",
        ),
    ]
    rows = [
        ("log p(x)", _nats_of(metrics), "nats, ± SE across examples"),
        ("ELBO", _number(metrics["elbo"], 2), "nats"),
        ("log p(x|z)", _number(metrics["log_px_z"], 2), "nats (minus the distortion)"),
        ("KL(q(z|x) ‖ p(z))", _number(metrics["kl"], 2), "nats (the rate)"),
        ("posterior gap", _number(metrics["posterior_gap"], 3), "nats"),
        ("effective sample size", _number(metrics["ess_median"], 0), f"median, of {samples:,}"),
        ("khat", _number(metrics["khat_median"], 2), "median"),
    ]
    if metrics["bits_per_dim"] is not None:
        bits = _bits(metrics["bits_per_dim"], metrics["bits_per_dim_se"])
        rows.insert(1, ("bits/dim", bits, "± SE across examples"))
    found = metrics.get("baselines") or {"baseline": metrics["baseline"]}
    baselines = [
        {
            "name": base["name"],
            "log_px": _number(base["log_px"], 2),
            "bits": _number(base["bits_per_dim"], 4),
            "gain": _gain(base),
            "gain_in_se": _number(base["gain_in_se"], 1),
        }
        for base in found.values()
    ]
    return {
        "words": words,
        "figures": figures,
        "rows": rows,
        "baselines": baselines,
        "bits": metrics["bits_per_dim"] is not None,
    }


def _collapse(inputs: Inputs) -> dict[str, str]:
    metrics = inputs.metrics
    note = (
        f"{metrics['active_units']} of {metrics['latent_dim']} latent dimensions are active: the "
        "variance over the test split of the posterior mean exceeds 0.01. An inactive one follows "
        f"the prior and tells nothing about x. The KL is {_number(metrics['kl'], 2)} nats."
    )
    return {"words": metrics["collapse"], "note": note}


def _selfcheck(selfcheck: dict[str, Any]) -> dict[str, Any]:
    checks = [
        {
            **check,
            **{key: _value(check.get(key)) for key in ("expected", "found", "tolerance")},
        }
        for check in selfcheck["checks"]
    ]
    passed = sum(bool(check["passed"]) for check in checks)
    words = (
        f"{passed} of {len(checks)} checks passed: before anything was trained, the estimators "
        "were compared with exact answers on linear-Gaussian models."
    )
    return {"passed": bool(selfcheck["passed"]), "words": words, "checks": checks}


def _card(inputs: Inputs) -> list[dict[str, Any]]:
    meta, model, objective = inputs.meta, inputs.best["model"], inputs.best["objective"]
    counts = meta.get("counts") or {}
    data = [
        ("data set", meta["dataset"]),
        ("source", meta.get("source", meta["dataset"])),
        ("space", _space(meta)),
        ("shape", " by ".join(str(size) for size in meta["data_shape"])),
        ("examples", ", ".join(f"{_split(name)} {count:,}" for name, count in counts.items())),
        ("content hash", meta["hash"]),
    ]
    architecture = [
        ("observation model p(x|z)", model["likelihood"]),
        ("latent dimension", _size(model["latent_dim"])),
        ("network", _network(model)),
        ("posterior q(z|x)", model.get("posterior")),
        ("prior p(z)", model.get("prior")),
        ("objective", _objective(objective)),
        ("smallest scale", model.get("min_scale")),
    ]
    unit = "nats per example" if inputs.metrics["bits_per_dim"] is None else "bits/dim and nats"
    architecture.append(("reported in", unit))
    if repeated := meta.get("repeated_columns"):
        names = ", ".join(str(name) for name in repeated)
        data.append(("columns with repeated values", f"{names}: a density can spike there"))
    return [
        {"title": "Data", "rows": [row for row in data if row[1] not in (None, "")]},
        {"title": "Model", "rows": [row for row in architecture if row[1] is not None]},
    ]


def _loading(inputs: Inputs) -> str:
    register = inputs.register
    name = register.get("model_name", "MODEL")
    place = register.get("alias")
    uri = f"models:/{name}@{place}" if place else f"models:/{name}/{register.get('version', 1)}"
    address = register.get("tracking_uri")
    lines = ["import mlflow", ""]
    if address:
        lines.append(f'mlflow.set_tracking_uri("{address}")')
    lines += [
        f'model = mlflow.pyfunc.load_model("{uri}")',
        'model.predict(x, params={"task": "score"})',
    ]
    return "\n".join(lines)


def _limits(inputs: Inputs) -> list[str]:
    limits = [
        "log p(x) is a lower bound in expectation; it is exact only where the encoder's posterior "
        "is. khat says for which examples the estimate should not be trusted.",
        "Errors across examples cover the choice of test examples, not of the training run: one "
        "seed was trained.",
        "Likelihood alone is a weak detector of out-of-distribution data: simpler data than the "
        "training set's often score higher.",
        f"Figures hold for {inputs.meta['space']} data prepared in the same way; log-likelihoods "
        "of another space or measure are not comparable.",
    ]
    return limits


def _provenance(inputs: Inputs) -> list[tuple[str, Any]]:
    register = inputs.register
    rows: list[tuple[str, Any]] = [
        ("data hash", inputs.meta["hash"]),
        ("weights hash", register.get("weights_hash")),
        ("git commit", register.get("git_commit")),
        ("sweep run", inputs.sweep_run.get("name")),
        ("training run", inputs.train_run.get("name")),
        ("training's stage hash", inputs.train_run.get("stage_hash")),
        ("trained until", _moment(inputs.train_run.get("finished"))),
        ("MLflow run", register.get("run_id")),
        ("MLflow store", register.get("tracking_uri")),
        ("versions", ", ".join(_versions("tightbound", "torch", "ray", "mlflow", "dvc"))),
    ]
    return [row for row in rows if row[1]]


# --- words and numbers ---------------------------------------------------------------------------


def _number(value: Any, digits: int) -> str:
    if value is None or not math.isfinite(float(value)):
        return "n/a"
    return f"{float(value):,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    text = f"{value:.6g}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if value < 0 else text


def _nats(value: float, error: float | None) -> str:
    return f"{_number(value, 2)} ± {_number(error, 2)}"


def _nats_of(metrics: dict[str, Any]) -> str:
    return _nats(metrics["log_px"], metrics["log_px_se"])


def _bits(value: float, error: float | None) -> str:
    return f"{_number(value, 4)} ± {_number(error, 4)}"


def _gain(base: dict[str, Any]) -> str:
    return f"{_number(base['gain'], 2)} ± {_number(base['gain_se'], 2)}"


def _percent(value: Any) -> str:
    missing = value is None or not math.isfinite(float(value))
    return "n/a" if missing else f"{float(value):.1%}"


def _size(latent_dim: Any) -> str:
    if isinstance(latent_dim, list | tuple):
        return " + ".join(str(size) for size in latent_dim)
    return str(latent_dim)


def _split(name: str) -> str:
    return {"train": "training", "valid": "validation"}.get(name, name)


def _space(meta: dict[str, Any]) -> str:
    words = {
        "grey8": "grey8: 256 levels, x in 0 … 255",
        "binary": "binary: x in {0, 1}",
        "continuous": "continuous: real numbers, density in raw units",
    }[meta["space"]]
    if meta["space"] == "binary" and meta.get("binarization"):
        words += f", {meta['binarization']} binarisation"
    return words


def _network(model: dict[str, Any]) -> str:
    hidden = "-".join(str(size) for size in model.get("hidden") or [])
    return f"{model.get('network')} {hidden or 'linear'}, {model.get('activation')}"


def _objective(objective: dict[str, Any]) -> str:
    words = f"{objective['name']}, K = {objective['num_samples']}"
    if objective.get("beta", 1.0) != 1.0:
        words += f", β = {objective['beta']}"
    if objective.get("beta_warmup_epochs"):
        words += f", β warmed up over {objective['beta_warmup_epochs']} epochs"
    if objective.get("free_bits"):
        words += f", {objective['free_bits']} free nats per latent dimension"
    return words


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else f"{pd.Timestamp(seconds, unit='s'):%Y-%m-%d %H:%M} UTC"


def _versions(*packages: str) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def _drawing(figure: Figure, name: str, title: str, caption: str = "") -> dict[str, str]:
    return {"title": title, "caption": caption, "svg": plots.to_svg(figure, name)}


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro` makes it") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); `dvc repro --force` remakes it"
        ) from error


def report(inputs: Inputs, out: Path) -> None:
    """Write the page to `out`, whole or not at all."""
    page = render(inputs)
    with whole_file(out) as fresh:
        fresh.write_text(page, encoding="utf-8")
    say(f"report  {out} ({len(page.encode()) / 1e6:.1f} MB): {verdict(inputs)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="pipeline.report", description=__doc__)
    parser.add_argument("--prepared", type=Path, default=Path("data/prepared"))
    parser.add_argument("--selfcheck", type=Path, default=Path("reports/selfcheck.json"))
    parser.add_argument("--sweep", type=Path, default=Path("reports/sweep"))
    parser.add_argument("--train", type=Path, default=Path("reports/train"))
    parser.add_argument("--evaluate", type=Path, default=Path("reports/evaluate"))
    parser.add_argument("--register", type=Path, default=Path("reports/register.json"))
    parser.add_argument("--report", type=Path, default=Path("reports/report.html"))
    paths = parser.parse_args()
    inputs = read_inputs(
        paths.prepared, paths.selfcheck, paths.sweep, paths.train, paths.evaluate, paths.register
    )
    report(inputs, paths.report)


if __name__ == "__main__":
    run_stage(main)
