"""Numbers and settings in the words of the report."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def number(value: float | None, digits: int) -> str:
    """With thousands separated and a true minus sign; "n/a" for None and what isn't finite."""
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{float(value):,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def plain(value: Any) -> str:
    """A number to six digits, anything else as it is, nothing for None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    text = f"{value:.6g}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if value < 0 else text


def nats(value: float, error: float | None) -> str:
    return f"{number(value, 2)} ± {number(error, 2)}"


def nats_of(metrics: dict[str, Any]) -> str:
    return nats(metrics["log_px"], metrics["log_px_se"])


def bits(value: float, error: float | None) -> str:
    return f"{number(value, 4)} ± {number(error, 4)}"


def gain(base: dict[str, Any]) -> str:
    return f"{number(base['gain'], 1)} ± {number(base['gain_se'], 1)}"


def percent(value: float | None) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.1%}"


def size(latent_dim: Any) -> str:
    if isinstance(latent_dim, list | tuple):
        return " + ".join(str(size) for size in latent_dim)
    return str(latent_dim)


def split_name(name: str) -> str:
    return {"train": "training", "valid": "validation"}.get(name, name)


def space(meta: dict[str, Any]) -> str:
    words = {
        "grey8": "grey8: 256 levels, x in 0 … 255",
        "binary": "binary: x in {0, 1}",
        "continuous": "continuous: real numbers, density in raw units",
    }[meta["space"]]
    if meta["space"] == "binary" and meta.get("binarization"):
        words += f", {meta['binarization']} binarisation"
    return words


def network(model: dict[str, Any]) -> str:
    hidden = "-".join(str(size) for size in model.get("hidden") or [])
    return f"{model.get('network')} {hidden or 'linear'}, {model.get('activation')}"


def objective(objective: dict[str, Any]) -> str:
    words = f"{objective['name']}, K = {objective['num_samples']}"
    if objective.get("backward_samples"):
        words += f", gradient through {objective['backward_samples']} of them"
    if objective.get("beta", 1.0) != 1.0:
        words += f", β = {objective['beta']}"
    if objective.get("beta_warmup_epochs"):
        words += f", β warmed up over {objective['beta_warmup_epochs']} epochs"
    if objective.get("free_bits"):
        words += f", {objective['free_bits']} free nats per latent dimension"
    return words


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def moment(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def versions(*packages: str) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
