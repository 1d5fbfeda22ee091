"""The space of a sweep: `sweep` of params.yaml → its axes, with all that is wrong about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.params.sweep_axes import (
    LATENT_DIM,
    LIKELIHOOD,
    Axis,
    Range,
    combinations,
    in_words,
    read_axis,
    section_values as values_of,
)
from vae.checks import did_you_mean

SECTIONS = ("model", "objective", "training")
ELSEWHERE = {
    LATENT_DIM: "its values stand in sweep.latent_dim",
    LIKELIHOOD: "its values stand in sweep.likelihood",
    "training.epochs": "trials are sweep.epochs long",
    "training.patience": "trials are sweep.epochs long",
    "training.memory_limit_mb": "it changes no result",
    "training.seed": "sweep.num_seeds trains each point with several seeds",
}
MOST_REPORTED = 3

Hints = Mapping[str, Mapping[str, Any]]  # section → name → type of the key
Faults = dict[str, str]  # key of params.yaml → what is wrong with it


def read_axes(
    sweep: Mapping[str, Any], model: Mapping[str, Any], hints: Hints
) -> tuple[tuple[Axis, ...], Faults]:
    """The axes: latent dimension and likelihood first, then those of `sweep.space`.

    sweep, model: these sections' values; what is missing is left out. An axis that `model` pins
    has one value.
    """
    wanted: dict[str, tuple[str, Any]] = {}  # swept key → where its values stand, and the values
    for key in (LATENT_DIM, LIKELIHOOD):
        name = key.partition(".")[2]
        pinned = model.get(name)
        if pinned is not None:
            wanted[key] = f"model.{name}", (pinned,)
        elif name in sweep:
            wanted[key] = f"sweep.{name}", sweep[name]
    faults: Faults = {}
    for key, values in sweep.get("space", {}).items():
        where = f"sweep.space.{key}"
        if fault := _key_fault(key, hints):
            faults[where] = fault
        else:
            wanted[key] = where, values
    axes = []
    for key, (where, values) in wanted.items():
        section, _, name = key.partition(".")
        try:
            axis = read_axis(key, values, hints[section][name])
        except ValueError as error:
            faults[where] = str(error)
            continue
        axes.append(axis)
        if isinstance(axis.values, Range) and sweep.get("search") == "grid":
            faults[where] = "grid needs a list of values; use sweep.search: random or optuna"
    return tuple(axes), faults


def _key_fault(key: str, hints: Hints) -> str | None:
    if key in ELSEWHERE:
        return f"it can't stand here; {ELSEWHERE[key]}"
    known = {f"{section}.{name}" for section in SECTIONS for name in hints[section]} - {*ELSEWHERE}
    if key in known:
        return None
    near = did_you_mean(key, known)
    if not near:  # perhaps written without its section
        full = [full for full in sorted(known) if full.partition(".")[2] == key][:1]
        near = f"; did you mean {full[0]}?" if full else f"; sections: {', '.join(SECTIONS)}"
    return f"there is no such key{near}"


def impossible(
    axes: Sequence[Axis],
    section: str,
    values: Mapping[str, Any],
    make: Callable[..., object],
) -> list[str]:
    """Combinations of a section's axes that `make` refuses, each with the reason.

    values: the section as params.yaml has it; make: builds the section from all its values and
    raises ValueError. At most three reasons, each with one combination.
    """
    own = [axis for axis in axes if axis.key.startswith(f"{section}.")]
    found: dict[str, str] = {}
    for point in combinations(own):
        try:
            make(**{**values, **values_of(point, section)})
        except ValueError as error:
            for line in str(error).splitlines():
                found.setdefault(_reason(line), _written(point, line, own))
    return list(found.values())[:MOST_REPORTED]


def _reason(line: str) -> str:
    """What a fault says, without the value that it says it about."""
    return line.partition("got ")[0]


def _written(point: Mapping[str, Any], line: str, axes: Sequence[Axis]) -> str:
    """The values that a fault is about: those that it names, or else all."""
    several = {axis.key: point[axis.key] for axis in axes if len(axis.probes) > 1}
    key, _, text = line.partition(": ")
    if key in point and len(several) < 2:
        return f"{key} {in_words(point[key])}: {text}"
    pairs = " with ".join(f"{name} {in_words(value)}" for name, value in several.items())
    return f"{pairs or 'its values'}: {line if key not in point else text}"
