"""params.yaml → `Params`: the only reader of params.yaml, at the door of every stage.

Each section is a frozen dataclass; those of the training objective and the training loop stand
beside the code that they configure, in `vae`. All faults of the file are reported at once, each
with its line, its key, the value found and what is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from pipeline.axes import LIKELIHOOD, Axis
from pipeline.fields import checked, describe, shown
from pipeline.space import SECTIONS as SWEPT_SECTIONS
from pipeline.space import impossible, read_axes
from pipeline.stage import UserError, run_stage
from pipeline.yaml_file import YamlFile, read_yaml
from vae.likelihoods import LIKELIHOODS, check_likelihood
from vae.model import VAEConfig
from vae.objectives import Objective
from vae.training import TrainingConfig

PARAMS_FILE = Path("params.yaml")

Count = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0), Le(2**31 - 1)]
Fraction = Annotated[float, Gt(0), Lt(1)]
Name = Annotated[str, MinLen(1)]
Size = Annotated[int, Ge(1), Le(65536)]
Side = Annotated[int, Ge(1), Le(1024)]
LatentDim = Size | Annotated[tuple[Size, ...], MinLen(1)]


class Section:
    """A section of params.yaml; types and ranges of its fields are checked when it is made."""

    def __post_init__(self) -> None:
        found = {name: getattr(self, name) for name in _defaults(type(self))}
        _, wrong = _check_types(type(self), found)
        faults = [f"{key}: {text}" for key, text in wrong.items()] or list(self._faults())
        if faults:
            raise ValueError("\n".join(faults))

    def _faults(self) -> Iterable[str]:
        """What is wrong between fields, each as "key: expected …, got …"."""
        return ()


# What `data.source` may begin with, besides the name of a user's module.
SOURCE_NAMES = ("mnist5k", "torchvision", "folder", "npz", "npy", "table")
_OUTPUTS = ("data/prepared", "models", "reports")
_TAKES_ARGUMENT = ("torchvision",)
_IMAGES = ("mnist5k", "torchvision", "folder")
# Keys that only some sources read.
_READ_BY = {
    "size": ("folder", "torchvision"),
    "channels": ("folder", "torchvision"),
    "columns": ("table",),
    "missing": ("table",),
    "id": ("table",),
    "label": ("table", "npz", "npy"),
    "group": ("table", "npz", "npy"),
}


@dataclass(frozen=True, kw_only=True)
class DataParams(Section):
    """`data`: where examples come from, as what they are modelled, and how they are split."""

    source: Name
    root: Name
    space: Literal["binary", "grey8", "continuous"]
    binarization: Literal["dynamic", "static", "threshold"]
    size: Side | tuple[Side, Side] | None
    channels: Literal[1, 3] | None
    columns: Annotated[tuple[Name, ...], MinLen(1)] | None
    missing: Literal["refuse", "mean", "median"]
    id: Name | None
    label: Name | None
    group: Name | None
    valid_fraction: Fraction
    test_fraction: Fraction
    seed: Seed
    limit: Annotated[int, Ge(10)] | None

    @property
    def source_name(self) -> str:
        """`data.source` up to the first colon."""
        return self.source.partition(":")[0]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """`data.size` as (height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def _faults(self) -> Iterable[str]:
        name, colon, argument = self.source.partition(":")
        module = all(part.isidentifier() for part in [*name.split("."), argument])
        known = argument or name not in _TAKES_ARGUMENT if name in SOURCE_NAMES else module
        if not known:
            near = _nearest(name, SOURCE_NAMES)
            yield f"source: {shown(self.source)} is no data source{near}, or your module:function"
        elif colon and name in SOURCE_NAMES and name not in _TAKES_ARGUMENT:
            yield f"source: {name} takes nothing after its name; got {shown(self.source)}"
        if self.space == "continuous" and name in _IMAGES:
            yield (
                f"space: continuous models real numbers, and source {name} gives 8-bit images; "
                "use grey8 or binary"
            )
        if self.space != "continuous" and name == "table":
            yield f"space: source table gives real numbers; use continuous, got {self.space}"
        root = PurePath(os.path.normpath(self.root))
        for output in map(PurePath, _OUTPUTS):
            if not root.is_absolute() and (
                output.is_relative_to(root) or root.is_relative_to(output)
            ):
                yield (
                    f"root: {shown(self.root)} meets {output}, which stages write; keep the data "
                    "in a folder of its own, such as data/own"
                )
                break
        for key, sources in _READ_BY.items():
            value = getattr(self, key)
            if value not in (None, "refuse") and name in SOURCE_NAMES and name not in sources:
                usual = "refuse" if key == "missing" else "null"
                yield f"{key}: source {name} does not read it; set it to {usual}"
        columns = self.columns or ()
        for column in sorted({column for column in columns if columns.count(column) > 1}):
            yield f"columns: expected each name once, got {shown(column)} again"
        for key in ("id", "label", "group"):
            if getattr(self, key) in columns:
                yield f"{key}: {shown(getattr(self, key))} is one of data.columns, too"


@dataclass(frozen=True, kw_only=True)
class ModelParams(Section):
    """`model`: what a `VAEConfig` needs besides the data's shape and space."""

    latent_dim: LatentDim | None
    likelihood: Name | None
    network: Name
    hidden: tuple[Size, ...]
    activation: Name
    posterior: Name
    prior: Name
    min_scale: Annotated[float, Gt(0)]
    num_components: Count
    prior_components: Count


@dataclass(frozen=True, kw_only=True)
class SweepParams(Section):
    """`sweep`: the space, how it is searched, the length of trials and how they are ranked."""

    search: Literal["grid", "random", "optuna"]
    latent_dim: Annotated[tuple[LatentDim, ...], MinLen(1)] | dict[str, Any]
    likelihood: Annotated[tuple[Name, ...], MinLen(1)]
    space: dict[str, Any]
    num_trials: Count
    num_seeds: Count
    epochs: Count
    num_importance_samples: Count
    scheduler: Literal["none", "asha"]
    seed: Seed
    max_concurrent: Count | None

    def _faults(self) -> Iterable[str]:
        if self.scheduler == "asha" and self.num_seeds > 1:
            yield (
                "num_seeds: asha stops trials one by one, which leaves points with fewer seeds; "
                "use num_seeds 1 or scheduler none"
            )


@dataclass(frozen=True, kw_only=True)
class ScalingParams(Section):
    """`scaling`: workers, threads and devices; results do not depend on it."""

    num_workers: Count
    min_workers: Count | None
    threads_per_worker: Count
    use_gpu: bool
    workers_per_trial: Count
    gpus_per_trial: Annotated[float, Gt(0), Le(1)]
    max_failures: Annotated[int, Ge(0)]
    storage: Name | None

    @property
    def fewest_workers(self) -> int:
        """Workers with which training still goes on."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def elastic(self) -> bool:
        return self.fewest_workers < self.num_workers

    def _faults(self) -> Iterable[str]:
        if self.fewest_workers > self.num_workers:
            yield (
                f"min_workers: expected at most num_workers, {self.num_workers}, got "
                f"{shown(self.min_workers)}"
            )
        if self.workers_per_trial > 1 and self.gpus_per_trial < 1:
            yield (
                "gpus_per_trial: each of several workers needs a GPU of its own; use "
                f"gpus_per_trial 1 or workers_per_trial 1, got {shown(self.gpus_per_trial)}"
            )
        scheme, colon, rest = (self.storage or "").partition("://")
        if colon and (scheme != "s3" or "?" in rest or not rest.strip("/")):
            yield f"storage: expected a path or s3://bucket/prefix, got {shown(self.storage)}"


@dataclass(frozen=True, kw_only=True)
class EvaluateParams(Section):
    """`evaluate`: the importance-sampled log p(x) of the test split."""

    num_importance_samples: Count
    target_se: Annotated[float, Gt(0)] | None
    proposal: Literal["encoder", "laplace", "refined"]
    precision: Literal["fp32", "bf16"]
    seed: Seed


@dataclass(frozen=True, kw_only=True)
class RegisterParams(Section):
    """`register`: promote None leaves the champion's alias to the gate; a bool decides it."""

    promote: bool | None


@dataclass(frozen=True, kw_only=True)
class TrackingParams(Section):
    """`tracking`: the MLflow experiment and server that mirror the runs."""

    experiment: Name
    uri: Name | None


@dataclass(frozen=True, kw_only=True)
class SubmitParams(Section):
    """`submit`: how `make submit` reaches a cluster, and brings results home."""

    folder: Name | None
    remote: Name | None
    python: Name | None
    forward: tuple[str, ...]

    def _faults(self) -> Iterable[str]:
        if self.folder is not None and not self.folder.startswith("/"):
            yield f"folder: expected an absolute path on the cluster, got {shown(self.folder)}"
        for name in self.forward:
            if not (name.isidentifier() and name.isascii()):
                yield f"forward: expected names of environment variables, got {shown(name)}"


@dataclass(frozen=True, kw_only=True)
class Params:
    """The whole of params.yaml; a stage takes its sections only."""

    data: DataParams
    model: ModelParams
    objective: Objective
    sweep: SweepParams
    training: TrainingConfig
    scaling: ScalingParams
    evaluate: EvaluateParams
    register: RegisterParams
    tracking: TrackingParams
    submit: SubmitParams

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What the sweep varies: latent dimension and likelihood first, then `sweep.space`."""
        axes, _ = read_axes(vars(self.sweep), vars(self.model), _swept_hints())
        return axes


_SECTIONS: dict[str, Any] = get_type_hints(Params)


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
            faults.setdefault(name, f"there is no such section{_nearest(name, _SECTIONS)}")
    for name, section in _SECTIONS.items():
        keys = ", ".join(_defaults(section))
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
    known = _defaults(section)
    for key in found:
        if key not in known:
            near = _nearest(key, known, f"{name}.")
            faults.setdefault(f"{name}.{key}", f"there is no such key{near}")
    for key, default in known.items():
        if key not in found:
            usual = "" if default is MISSING else f"; usually {shown(default)}"
            text = f"the key is missing; expected {describe(_hints(section)[key])}{usual}"
            faults.setdefault(f"{name}.{key}", text)
    values, wrong = _check_types(section, {k: v for k, v in found.items() if k in known})
    faults |= {f"{name}.{key}": text for key, text in wrong.items()}
    # A class with defaults can say more although a key is wrong or missing.
    if all(key in values or default is not MISSING for key, default in known.items()):
        _collect(name, lambda: section(**values), faults)
    return values


def _check_types(section: Any, found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values in their declared types, and what is wrong with each of the others."""
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for key, value in found.items():
        try:
            values[key] = checked(_hints(section)[key], value)
        except ValueError as error:
            wrong[key] = str(error)
    return values, wrong


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
        raise ValueError(f"{name!r} is unknown{_nearest(name, LIKELIHOODS)}")
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
            if colon and key in _defaults(_SECTIONS[section]):
                _add(faults, f"{section}.{key}", text)
            else:
                _add(faults, where, line)


def _add(faults: dict[str, str], key: str, text: str) -> None:
    if text not in faults.get(key, ""):
        faults[key] = f"{faults[key]}; {text}" if key in faults else text


@cache
def _hints(section: Any) -> dict[str, Any]:
    return get_type_hints(section, include_extras=True)


def _swept_hints() -> dict[str, dict[str, Any]]:
    return {section: _hints(_SECTIONS[section]) for section in SWEPT_SECTIONS}


@cache
def _defaults(section: Any) -> dict[str, Any]:
    """The section's keys, each with its default or MISSING."""
    return {field.name: field.default for field in fields(section)}


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    names = list(known)
    close = get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; there are {', '.join(names)}"


def _message(file: YamlFile, faults: dict[str, str]) -> str:
    def place(key: str) -> int:
        return file.line(key) or 10**9

    lines = [f"{file.path} has {len(faults)} fault{'s' * (len(faults) > 1)}:"]
    for key in sorted(faults, key=place):
        line = f"line {file.line(key)}: " if file.line(key) else ""
        lines.append(f"  {line}{key}: {faults[key]}")
    return "\n".join(lines)


def main() -> None:
    """Check params.yaml in this folder; silent when it is right."""
    load_params()


if __name__ == "__main__":
    run_stage(main)
