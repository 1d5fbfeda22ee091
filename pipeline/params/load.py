"""params.yaml → `Params`: the only reader of the whole file, at the door of every stage.

All faults of the file are reported at once, each with its line, its key, the value found and what
is allowed. It takes torch, since the core itself checks what `model` and `objective` say; a stage
that computes nothing reads `pipeline.params.without_torch`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.params.sections import PARAMS_FILE, PlainParams, check_types, defaults, hints, nearest
from pipeline.params.sweep_axes import LIKELIHOOD, Axis
from pipeline.params.sweep_space import SECTIONS as SWEPT_SECTIONS, impossible, read_axes
from pipeline.params.value_types import describe, shown
from pipeline.params.yaml_file import YamlFile, read_yaml
from pipeline.stage import UserError
from vae.models import LIKELIHOODS, VAEConfig, check_likelihood
from vae.objectives import Objective
from vae.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Params(PlainParams):
    """The whole of params.yaml; a stage takes its sections only."""

    objective: Objective
    training: TrainingConfig

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What the sweep varies: latent dimension and likelihood first, then `sweep.space`."""
        axes, _ = read_axes(vars(self.sweep), vars(self.model), _swept_hints())
        return axes


_SECTIONS = hints(Params)


def load_params(path: str | Path = PARAMS_FILE) -> Params:
    """Read and check params.yaml. Raises UserError that lists every fault of the file."""
    file = read_yaml(Path(path))
    faults = dict(file.faults)
    sections = _check_sections(file.content, faults)
    space = sections.get("data", {}).get("space")
    _check_model(sections, space, faults)
    _check_sweep(sections, space, faults)
    if faults:
        raise UserError(_message(file, faults))
    return Params(**{name: _SECTIONS[name](**values) for name, values in sections.items()})


def _check_sections(content: dict[str, Any], faults: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The values of each section that have the right type; what is wrong goes to `faults`."""
    sections: dict[str, dict[str, Any]] = {}
    for name in content:
        if name not in _SECTIONS:
            faults.setdefault(name, f"there is no such section{nearest(name, _SECTIONS)}")
    for name, section in _SECTIONS.items():
        keys = ", ".join(defaults(section))
        found = content.get(name)
        if name not in content:
            faults.setdefault(name, f"the section is missing; its keys: {keys}")
        elif not isinstance(found, dict):
            faults.setdefault(name, f"expected a section with keys {keys}, got {shown(found)}")
        else:
            sections[name] = _check_section(name, section, found, faults)
    return sections


def _check_section(
    name: str, section: Any, found: dict[str, Any], faults: dict[str, str]
) -> dict[str, Any]:
    known = defaults(section)
    for key in found:
        if key not in known:
            near = nearest(key, known, f"{name}.")
            faults.setdefault(f"{name}.{key}", f"there is no such key{near}")
    for key, default in known.items():
        if key not in found:
            usual = "" if default is MISSING else f"; usually {shown(default)}"
            text = f"the key is missing; expected {describe(hints(section)[key])}{usual}"
            faults.setdefault(f"{name}.{key}", text)
    values, wrong = check_types(section, {k: v for k, v in found.items() if k in known})
    faults |= {f"{name}.{key}": text for key, text in wrong.items()}
    # A class with defaults can say more although a key is wrong or missing.
    if all(key in values or default is not MISSING for key, default in known.items()):
        _collect(name, lambda: section(**values), faults)
    return values


def _check_model(
    sections: dict[str, dict[str, Any]], space: str | None, faults: dict[str, str]
) -> None:
    """Likelihoods against the data's space (None: unknown), `model` against the core's checks."""
    model = sections.get("model", {})
    pinned = model.get("likelihood")
    if pinned is not None:
        _collect("model.likelihood", lambda: _check_likelihood(pinned, space), faults)
    for name in sections.get("sweep", {}).get("likelihood", ()):
        # Pinned, the sweep's list is not used, and need not be of this space.
        used_in = space if pinned is None else None
        _collect("sweep.likelihood", lambda n=name, s=used_in: _check_likelihood(n, s), faults)
    _collect("model", lambda: _probe_model(space, **model), faults)


def _check_sweep(
    sections: dict[str, dict[str, Any]], space: str | None, faults: dict[str, str]
) -> None:
    """The sweep's axes, and the combinations of their values, against the core's checks."""
    axes, wrong = read_axes(sections.get("sweep", {}), sections.get("model", {}), _swept_hints())
    for key, text in wrong.items():
        faults.setdefault(key, text)
    workers = sections.get("scaling", {}).get("workers_per_trial", 1)
    if sections.get("sweep", {}).get("scheduler") == "asha" and workers > 1:
        faults["scaling.workers_per_trial"] = (
            f"asha can stop trials of one worker only; use 1 or sweep.scheduler none, got {workers}"
        )
    for section in SWEPT_SECTIONS:
        if any(key.startswith((f"{section}.", f"sweep.space.{section}.")) for key in faults):
            continue  # its combinations would only repeat that
        make = partial(_probe_model, space) if section == "model" else _SECTIONS[section]
        others = [axis for axis in axes if axis.key != LIKELIHOOD]
        for text in impossible(others, section, sections.get(section, {}), make):
            _add(faults, "sweep.space", text)


def _probe_model(space: str | None, **values: Any) -> VAEConfig:
    """A model with these values of `model`, on data of this space (None: unknown)."""
    space = space or "grey8"
    likelihood, data_shape = _PROBES[space]
    given = {key: value for key, value in values.items() if value is not None}
    probe: dict[str, Any] = {"latent_dim": 1} | given | {"likelihood": likelihood}
    return VAEConfig(data_shape=data_shape, space=space, **probe)


# A likelihood and a shape that each space allows, to check all else of `model`. Whether a network
# fits the data's own shape is known when the data is prepared.
_PROBES: dict[str, tuple[str, tuple[int, ...]]] = {
    "binary": ("bernoulli", (1, 64, 64)),
    "grey8": ("gaussian", (1, 64, 64)),
    "continuous": ("gaussian", (64,)),
}


def _check_likelihood(name: str, space: str | None) -> None:
    if name not in LIKELIHOODS:
        raise ValueError(f"{name!r} is unknown{nearest(name, LIKELIHOODS)}")
    if space is not None:
        check_likelihood(name, space)


def _collect(where: str, make: Callable[[], object], faults: dict[str, str]) -> None:
    """Add the lines of the ValueError that `make` raises, each to the key that it begins with."""
    try:
        make()
    except ValueError as error:
        section = where.partition(".")[0]
        for line in str(error).splitlines():
            key, colon, text = line.partition(": ")
            key = key.removeprefix(f"{section}.")
            if colon and key in defaults(_SECTIONS[section]):
                _add(faults, f"{section}.{key}", text)
            else:
                _add(faults, where, line)


def _add(faults: dict[str, str], key: str, text: str) -> None:
    if text not in faults.get(key, ""):
        faults[key] = f"{faults[key]}; {text}" if key in faults else text


def _swept_hints() -> dict[str, dict[str, Any]]:
    return {section: hints(_SECTIONS[section]) for section in SWEPT_SECTIONS}


def _message(file: YamlFile, faults: dict[str, str]) -> str:
    def place(key: str) -> int:
        return file.line(key) or 10**9

    lines = [f"{file.path} has {len(faults)} fault{'s' * (len(faults) > 1)}:"]
    for key in sorted(faults, key=place):
        line = f"line {file.line(key)}: " if file.line(key) else ""
        lines.append(f"  {line}{key}: {faults[key]}")
    return "\n".join(lines)
