"""The model card: what a version is, how good it is, how to load it and what it can't do.

As Markdown it is the version's description in MLflow; the report shows the same facts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.report import words as text
from vae.trust import KHAT_LIMIT

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_LENGTH = 40
Rows = list[tuple[str, str]]


def data_rows(meta: Mapping[str, Any]) -> Rows:
    """What the model was trained on."""
    counts = meta.get("counts") or {}
    rows = [
        ("data set", meta["dataset"]),
        ("source", meta.get("source", meta["dataset"])),
        ("space", text.space(dict(meta))),
        ("shape", " by ".join(str(size) for size in meta["data_shape"])),
        ("examples", ", ".join(f"{text.split_name(n)} {count:,}" for n, count in counts.items())),
        ("content hash", meta["hash"]),
    ]
    if repeated := meta.get("repeated_columns"):
        names = ", ".join(map(str, repeated))
        rows.append(("columns with repeated values", f"{names}: a density can spike there"))
    if filled := meta.get("filled"):
        words = ", ".join(f"{name} by {value:g}" for name, value in filled.items())
        rows.append(("missing values filled", words))
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def model_rows(model: Mapping[str, Any], objective: Mapping[str, Any] | None) -> Rows:
    """Its architecture and what was maximised."""
    discrete = model["space"] != "continuous"
    rows = [
        ("observation model p(x|z)", model["likelihood"]),
        ("latent dimension", text.size(model["latent_dim"])),
        ("network", text.network(dict(model))),
        ("posterior q(z|x)", model.get("posterior")),
        ("prior p(z)", model.get("prior")),
        ("objective", None if objective is None else text.objective(dict(objective))),
        ("smallest scale", model.get("min_scale")),
        ("reported in", "bits/dim and nats" if discrete else "nats per example"),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def evidence_rows(metrics: Mapping[str, Any]) -> Rows:
    """log p(x) of the test split with both errors, and what it compares with."""
    base = metrics["baseline"]
    rows = [
        (
            "log p(x)",
            f"{text.nats_of(dict(metrics))} nats (K = {metrics['num_samples']:,}; error across "
            f"{metrics['num_examples']:,} test examples; Monte-Carlo error "
            f"{text.number(metrics['log_px_mc_se'], 3)})",
        ),
        (
            f"khat > {KHAT_LIMIT:g}",
            f"on {text.percent(metrics['khat_bad_fraction'])} of the examples",
        ),
        (
            "ladder",
            ", ".join(f"K = {int(k):,}: {text.number(v, 2)}" for k, v in metrics["ladder"].items()),
        ),
        (
            "examples without log p(x)",
            f"{metrics['num_unscored']:,}, in no mean" if metrics.get("num_unscored") else "",
        ),
        ("active units", f"{metrics['active_units']} of {metrics['latent_dim']}"),
        (
            "baseline",
            f"{base['name']}: {text.number(base['log_px'], 2)} nats; gain {text.gain(dict(base))}",
        ),
    ]
    if metrics["bits_per_dim"] is not None:
        found = text.bits(metrics["bits_per_dim"], metrics["bits_per_dim_se"])
        rows.insert(1, ("bits/dim", found))
    return [(name, value) for name, value in rows if value]


def curve(history: pd.DataFrame) -> str:
    """The validation ELBO by epoch, in a line of blocks, from its lowest to its highest value."""
    values = history["valid_elbo"].dropna().to_numpy(dtype=float)
    if not len(values):
        return ""
    step = max(1, -(-len(values) // CURVE_LENGTH))
    values = values[::step]
    low, span = values.min(), max(float(values.max() - values.min()), 1e-12)
    blocks = "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in values)
    first, best = text.number(float(values[0]), 1), text.number(float(values.max()), 1)
    return f"{blocks} validation ELBO over {len(history)} epochs, {first} to {best} nats"


def limits(metrics: Mapping[str, Any], space: str) -> list[str]:
    """What the figures do not say."""
    words = [
        "log p(x) is a lower bound in expectation; it is exact only where z is drawn from the "
        "posterior itself. khat says for which examples the estimate should not be trusted.",
        "Errors across examples cover the choice of test examples, not of the training run: one "
        "seed was trained.",
        "Likelihood alone is a weak detector of out-of-distribution data: simpler data than the "
        "training set's often score higher." + _shifted_words(metrics.get("shifted") or {}),
        f"Figures hold for {space} data prepared in the same way; log-likelihoods of another "
        "space or measure are not comparable.",
    ]
    return words


def _shifted_words(shifted: Mapping[str, Mapping[str, float]]) -> str:
    if not shifted:
        return ""
    found = ", ".join(f"{name} {row['auroc']:.2f}" for name, row in shifted.items())
    return (
        f" On this model, AUROC of log p(x), test examples against shifted ones: {found} "
        "(1: always told apart; 0.5: not at all; below: the shifted ones score higher)."
    )


def markdown(
    register: Mapping[str, Any],
    meta: Mapping[str, Any],
    model: Mapping[str, Any],
    objective: Mapping[str, Any] | None,
    metrics: Mapping[str, Any],
    history: pd.DataFrame,
    lock_hash: str | None,
) -> str:
    """The version's page in MLflow."""
    name, version = register["model_name"], register["version"]
    checks = register["selfcheck"]
    made = [
        ("git commit", register["git_commit"]),
        ("dvc.lock, SHA-256", lock_hash),
        ("weights, SHA-256", register["weights_hash"]),
        ("self-check", f"{checks['passed_checks']} of {checks['num_checks']} checks passed"),
        ("looks at this test split", register["looks"]),
    ]
    load = (
        "```python\nimport mlflow\n"
        f'model = mlflow.pyfunc.load_model("models:/{name}/{version}")\n'
        'model.predict(x, params={"task": "score"})'
        "  # or encode, decode, reconstruct, sample\n```"
    )
    parts = [
        f"**{register['verdict']}**: {'; '.join(map(literal, register['reasons']))}.",
        _table("Evidence", evidence_rows(metrics)),
        curve(history),
        _table("Data", [(name, literal(value)) for name, value in data_rows(meta)]),
        _table("Model", model_rows(model, objective)),
        _table("Provenance", [(key, str(value)) for key, value in made if value is not None]),
        f"### How to load it\n\n{load}",
        "### Limits\n\n" + "\n".join(f"- {limit}" for limit in limits(metrics, model["space"])),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join([f"### {title}", "", "| | |", "|---|---|", *lines])


def literal(words: str) -> str:
    """Words of the user's, such as names of columns, with nothing that Markdown takes for its own.

    A "|" stays, for `_cell`.
    """
    line = "".join(letter if letter.isprintable() else " " for letter in words)
    return re.sub(r"([\\`*_\[\]<>&~#!$])", r"\\\1", line)


def _cell(words: str) -> str:
    return words.replace("|", "\\|")
