"""The sections of params.yaml, each a frozen dataclass that checks itself when it is made.

Those of the training objective and the training loop stand beside the code that they configure, in
`vae`: `pipeline.params` reads them too, with all the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from pipeline.params.value_types import checked, shown
from vae.checks import did_you_mean

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
        found = {name: getattr(self, name) for name in defaults(type(self))}
        _, wrong = check_types(type(self), found)
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
            near = nearest(name, SOURCE_NAMES)
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
class PlainParams:
    """The sections that are read without torch, whose import takes seconds."""

    data: DataParams
    model: ModelParams
    sweep: SweepParams
    scaling: ScalingParams
    evaluate: EvaluateParams
    register: RegisterParams
    tracking: TrackingParams
    submit: SubmitParams


def check_types(section: Any, found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values in their declared types, and what is wrong with each of the others."""
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for key, value in found.items():
        try:
            values[key] = checked(hints(section)[key], value)
        except ValueError as error:
            wrong[key] = str(error)
    return values, wrong


@cache
def hints(section: Any) -> dict[str, Any]:
    """The type of each key of a section, or the class of each section of params."""
    return get_type_hints(section, include_extras=True)


@cache
def defaults(section: Any) -> dict[str, Any]:
    """The section's keys, each with its default or MISSING."""
    return {field.name: field.default for field in fields(section)}


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    names = list(known)
    return did_you_mean(name, names, prefix) or f"; there are {', '.join(names)}"
