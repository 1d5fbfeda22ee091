"""The report's parts: each takes the inputs and returns what the template shows."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pipeline.figures import plots, to_svg
from pipeline.report import model_card, words as text
from pipeline.report.inputs import Inputs
from vae.trust import KHAT_LIMIT

PICTURES = {
    "reconstructions.png": (
        "Reconstructions",
        "Test examples, the mean of p(x|z) at their encoder's posterior mean, and a draw from it.",
    ),
    "extremes.png": (
        "Least and most likely",
        "The test examples with the lowest and the highest log p(x), which stands above each, in "
        "nats.",
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
}
LATENT_PICTURES = {
    "activity.png": (
        "Activity of the latent dimensions",
        "A dimension whose posterior mean hardly varies with x follows the prior and tells "
        "nothing about x.",
    ),
    "latent_space.png": (
        "Latent space",
        "Posterior means of the test split; colours are labels, which the model never saw.",
    ),
}
TABLE_CAPTIONS = {
    "reconstructions.png": "Each column of the test rows against the mean of p(x|z) at their "
    "encoder's posterior mean.",
    "samples.png": "Each column of the test rows, and of as many rows drawn from the model.",
    "traversals.png": "The mean of p(x|z), in standard deviations of each column, as one latent "
    "dimension moves by 3 standard deviations of the aggregate posterior to each side.",
}
KHAT_TOLERATED = 0.1  # share of the examples; above it the registry's gate stays shut


def verdict(inputs: Inputs) -> str:
    """The page's first sentence: what the model is, how good it is, and by how many errors."""
    metrics, register = inputs.metrics, inputs.register
    name = register.get("model_name", "this model")
    number_ = register.get("version")
    which = name if number_ is None else f"{name}, version {number_},"
    if register.get("alias") == "champion":
        start = f"{which} is the champion"
    elif number_ is not None:
        start = f"{which} is a challenger, not the champion"
    else:
        start = f"{which} is not registered"
    score = f"log p(x) = {text.nats(metrics['log_px'], metrics['log_px_se'])} nats"
    if metrics["bits_per_dim"] is not None:
        score += f" ({text.bits(metrics['bits_per_dim'], metrics['bits_per_dim_se'])} bits/dim)"
    unscored = metrics.get("num_unscored")
    lost = f" {unscored:,} more can't be scored." if unscored else ""
    base = metrics["baseline"]
    if base["gain"] is None:
        return f"{start}: {score} on {metrics['num_examples']:,} test examples.{lost}"
    direction = "better" if base["gain"] >= 0 else "worse"
    compared = f"{text.number(abs(base['gain']), 1)} nats {direction} than {base['name']}"
    if base["gain_in_se"] is not None:
        errors = text.number(abs(base["gain_in_se"]), 1)
        compared += f", {errors} standard errors of the paired difference"
    return f"{start}: {score} on {metrics['num_examples']:,} test examples, {compared}.{lost}"


def warning(inputs: Inputs) -> str:
    """What forbids trust in the figures, or nothing."""
    bad = inputs.metrics["khat_bad_fraction"]
    if bad is None or bad <= KHAT_TOLERATED:
        return ""
    return (
        f"Not to be trusted as exact: khat exceeds {KHAT_LIMIT:g} on {bad:.1%} of the test "
        "examples. There a few draws carry the estimate, its Monte-Carlo error is understated, and "
        "more samples would still raise it. It remains a lower bound in expectation."
    )


def badge(register: dict[str, Any]) -> str:
    if register.get("version") is None:
        return "not registered"
    return f"{register.get('alias') or 'registered'} · version {register['version']}"


def pictures(inputs: Inputs, named: dict[str, tuple[str, str]]) -> list[dict[str, str]]:
    captions = TABLE_CAPTIONS if len(inputs.meta["data_shape"]) == 1 else {}
    return [
        {
            "title": title,
            "caption": captions.get(name, caption),
            "svg": "",
            "uri": inputs.pictures[name],
        }
        for name, (title, caption) in named.items()
        if name in inputs.pictures
    ]


def tiles(inputs: Inputs) -> list[dict[str, Any]]:
    metrics = inputs.metrics
    base, bad = metrics["baseline"], metrics["khat_bad_fraction"]
    tiles = [("log p(x), nats", metrics["log_px"], metrics["log_px_se"], 2)]
    if metrics["bits_per_dim"] is not None:
        tiles.append(("bits/dim", metrics["bits_per_dim"], metrics["bits_per_dim_se"], 4))
    tiles.append(("nats better than the baseline", base["gain"], base["gain_se"], 2))
    shown = [
        {"words": words, "value": text.number(value, digits), "error": text.number(error, digits)}
        for words, value, error, digits in tiles
    ]
    active = f"{metrics['active_units']} of {metrics['latent_dim']}"
    monte_carlo = text.number(metrics["log_px_mc_se"], 3)
    return [
        *({**tile, "bad": False} for tile in shown),
        {"words": "active latent dimensions", "value": active, "error": "", "bad": False},
        {"words": "Monte-Carlo error, nats", "value": monte_carlo, "error": "", "bad": False},
        {
            "words": f"examples with khat > {KHAT_LIMIT:g}",
            "value": text.percent(bad),
            "error": "",
            "bad": bad is not None and bad > KHAT_TOLERATED,
        },
    ]


def training_section(inputs: Inputs) -> dict[str, Any]:
    facts = inputs.train_metrics
    words = (
        f"{facts['epochs']} epochs in {text.duration(facts['seconds'])} on {facts['num_workers']} "
        f"data-parallel worker{'s' if facts['num_workers'] != 1 else ''} "
        f"({facts['images_per_s']:,.0f} examples/s); the weights of epoch {facts['best_epoch']} "
        f"are kept: validation ELBO {text.number(facts['valid_elbo'], 2)} nats."
    )
    figures = [
        drawing(plots.curve_figure(inputs.history, column), f"curve-{column}", title)
        for column, title in plots.CURVES
    ]
    return {"words": words, "figures": figures}


_PROPOSALS = {
    "encoder": "the encoder's posterior",
    "laplace": "a Gaussian at its posterior's mode",
    "refined": "a Gaussian fitted to its posterior",
}


def _evidence_figures(
    metrics: dict[str, Any], examples: pd.DataFrame, samples: int
) -> list[dict[str, str]]:
    baseline = examples["baseline_log_px"].to_numpy()
    return [
        drawing(
            plots.log_px_figure(examples["log_px"].to_numpy(), baseline),
            "log-px",
            "log p(x) of the test examples",
            f"The baseline is {metrics['baseline']['name']}.",
        ),
        drawing(
            plots.ladder_figure(metrics["ladder"], metrics["elbo"]),
            "ladder",
            "What the bound gains with K",
            f"The encoder's ELBO loses {text.number(metrics['posterior_gap'], 2)} nats: the "
            "posterior gap, KL(q(z|x) ‖ p(z|x)) as far as K samples can tell.",
        ),
        drawing(
            plots.ess_figure(examples["ess"].to_numpy(), samples),
            "ess",
            "Effective sample size",
            "How many of the K draws carry the estimate.",
        ),
        drawing(
            plots.khat_figure(examples["khat"].to_numpy()),
            "khat",
            "Tail of the importance weights",
            f"Above {KHAT_LIMIT:g} an estimate and its error are not to be trusted: too few draws, "
            "or a proposal too narrow.",
        ),
    ]


def evidence_section(inputs: Inputs) -> dict[str, Any]:
    metrics, examples = inputs.metrics, inputs.examples
    samples = metrics["num_samples"]
    draws = f"K = {samples:,} draws for each example"
    if metrics.get("target_se"):
        draws = (
            f"at most {samples:,} draws for each example, {metrics['samples_mean']:,.0f} in the "
            f"mean: until its Monte-Carlo error is {metrics['target_se']:g} nats and can be trusted"
        )
    words = (
        f"log p(x) is estimated by importance sampling with {draws} "
        f"from {_PROPOSALS[metrics.get('proposal', 'encoder')]}; in expectation it is a lower "
        "bound. Two errors, never mixed: that of "
        f"the mean across examples ({text.number(metrics['log_px_se'], 2)} nats) and the "
        f"Monte-Carlo error of the mean ({text.number(metrics['log_px_mc_se'], 3)} nats)."
    )
    if metrics.get("precision") == "bf16":
        words += " The decoder's matrix products are taken in bfloat16."
    rows = [
        ("log p(x)", text.nats_of(metrics), "nats, ± SE across examples"),
        ("ELBO", text.number(metrics["elbo"], 2), "nats"),
        ("log p(x|z)", text.number(metrics["log_px_z"], 2), "nats (minus the distortion)"),
        ("KL(q(z|x) ‖ p(z))", text.number(metrics["kl"], 2), "nats (the rate)"),
        ("posterior gap", text.number(metrics["posterior_gap"], 3), "nats"),
        ("effective sample size", text.number(metrics["ess_median"], 0), f"median, of {samples:,}"),
        ("khat", text.number(metrics["khat_median"], 2), "median"),
    ]
    if metrics["bits_per_dim"] is not None:
        found = text.bits(metrics["bits_per_dim"], metrics["bits_per_dim_se"])
        rows.insert(1, ("bits/dim", found, "± SE across examples"))
    compared = metrics.get("baselines") or {"baseline": metrics["baseline"]}
    baselines = [
        {
            "name": base["name"],
            "log_px": text.number(base["log_px"], 2),
            "bits": text.number(base["bits_per_dim"], 4),
            "gain": text.gain(base),
            "gain_in_se": text.number(base["gain_in_se"], 1),
        }
        for base in compared.values()
    ]
    return {
        "words": words,
        "figures": _evidence_figures(metrics, examples, samples),
        "rows": rows,
        "baselines": baselines,
        "bits": metrics["bits_per_dim"] is not None,
    }


def collapse_section(inputs: Inputs) -> dict[str, str]:
    metrics = inputs.metrics
    words = metrics["collapse"]
    note = (
        "A dimension is active where the variance over the test split of its posterior mean "
        f"exceeds 0.01. The KL is {text.number(metrics['kl'], 2)} nats: what z tells about x."
    )
    return {"words": f"{words[:1].upper()}{words[1:].rstrip('.')}.", "note": note}


def selfcheck_section(selfcheck: dict[str, Any]) -> dict[str, Any]:
    checks = [
        {
            **check,
            **{key: text.plain(check.get(key)) for key in ("expected", "found", "tolerance")},
        }
        for check in selfcheck["checks"]
    ]
    passed = sum(bool(check["passed"]) for check in checks)
    words = (
        f"{passed} of {len(checks)} checks passed: before anything was trained, the estimators "
        "were compared with exact answers on linear-Gaussian models."
    )
    return {"passed": bool(selfcheck["passed"]), "words": words, "checks": checks}


def card_section(inputs: Inputs) -> list[dict[str, Any]]:
    best = inputs.best
    return [
        {"title": "Data", "rows": model_card.data_rows(inputs.meta)},
        {"title": "Model", "rows": model_card.model_rows(best["model"], best["objective"])},
        {"title": "Evidence", "rows": model_card.evidence_rows(inputs.metrics)},
    ]


def loading(inputs: Inputs) -> str:
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


def provenance(inputs: Inputs) -> list[tuple[str, Any]]:
    register = inputs.register
    rows: list[tuple[str, Any]] = [
        ("data hash", inputs.meta["hash"]),
        ("weights hash", register.get("weights_hash")),
        ("git commit", register.get("git_commit")),
        (
            "dvc.lock",
            "its SHA-256 is the tag dvc_lock of the version, set when the run is complete",
        ),
        ("looks at this test split", register.get("looks")),
        ("sweep run", inputs.sweep_run.get("name")),
        ("training run", inputs.train_run.get("name")),
        ("training's stage hash", inputs.train_run.get("stage_hash")),
        ("trained until", text.moment(inputs.train_run.get("finished"))),
        ("MLflow run", register.get("run_id")),
        ("MLflow store", register.get("tracking_uri")),
        ("versions", ", ".join(text.versions("tightbound", "torch", "ray", "mlflow", "dvc"))),
    ]
    return [row for row in rows if row[1]]


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.itertuples(index=False)]


def drawing(figure: Figure, name: str, title: str, caption: str = "") -> dict[str, str]:
    return {"title": title, "caption": caption, "svg": to_svg(figure, name)}
