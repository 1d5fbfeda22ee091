"""One registered model in MLflow's registry: its versions, aliases and the record of promotions.

`python -m pipeline.register.registry --promote 3` and `--rollback` move the champion's alias by
hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.register.gate import CHALLENGER, CHAMPION
from pipeline.register.record import TAGS
from pipeline.stage import UserError, read_json, run_stage, say
from pipeline.tracking import Store, Unreachable, another_may_be_faster, import_mlflow, insist

REQUIREMENTS = ("mlflow", "torch", "numpy", "numba", "pandas", "safetensors")
WEIGHTS_TAG = "weights_hash"
HISTORY_TAG = "champions"  # of the registered model: who was champion, since when, and by what
TAKEN_BACK_TAG = "taken_back"  # of a version from which a person took the alias
LONGEST_HISTORY = 40
LONGEST_TAG = 4500
LONGEST_PAGE = 5000  # characters of a description, in PostgreSQL and MySQL
CUT = "\n\n… cut here; reports/report.html has it whole\n"


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered version."""

    number: int
    run_id: str
    tags: Mapping[str, str]
    model_id: str | None


class Registry:
    """The registered model `name` in an open store."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        self.client = store.client
        self._mlflow = import_mlflow()
        self._mlflow.set_tracking_uri(store.address)
        self._mlflow.set_registry_uri(store.address)

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        found: list[Version] = []
        token = None
        with self.store.failures():
            while True:
                page = self.client.search_model_versions(
                    f"name='{self.name}'", max_results=500, page_token=token
                )
                found += [_version(entry) for entry in page]
                token = page.token
                if not token:
                    return sorted(found, key=lambda version: version.number)

    def with_weights(self, weights_hash: str) -> Version | None:
        """The version that holds these weights."""
        return next((v for v in self.versions() if v.tags.get(WEIGHTS_TAG) == weights_hash), None)

    def alias(self, alias: str) -> int | None:
        """The version number that an alias stands on."""
        number = self._registered().aliases.get(alias)
        return None if number is None else int(number)

    def ensure_exists(self) -> None:
        """Create the registered model where the registry has none of that name."""
        with self.store.failures():
            if not self.client.search_registered_models(f"name='{self.name}'"):
                with another_may_be_faster():
                    self.client.create_registered_model(self.name)

    def add(
        self,
        run_id: str,
        *,
        model: Path,
        reference: Path,
        data: Mapping[str, Any],
        example: np.ndarray,
        tags: dict[str, str],
    ) -> Version:
        """Log the model to its run and register it as the next version.

        model: a folder that `vae.save` wrote. reference: quantiles of log p(x) on the validation
        split. data: what the model must know of its data, such as a table's columns. example: a few
        x, shown as the model's input.
        """
        with self.store.failures(), _packed(model, reference, data, example) as content:
            with self._mlflow.start_run(run_id=run_id):
                info = self._mlflow.pyfunc.log_model(name="vae", **content)
            created = self.client.create_model_version(
                self.name, info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id
            )
        return _version(created)

    def restore_files(
        self,
        version: Version,
        *,
        model: Path,
        reference: Path,
        data: Mapping[str, Any],
        example: np.ndarray,
    ) -> bool:
        """Bring back a version's files if they are gone from the artifact store."""
        if version.model_id is None:
            return False
        with self.store.failures():
            there = {e.path for e in self.client.list_logged_model_artifacts(version.model_id)}
            if "MLmodel" in there:
                return False
            with (
                _packed(model, reference, data, example) as content,
                tempfile.TemporaryDirectory() as folder,
            ):
                target = Path(folder) / "model"
                self._mlflow.pyfunc.save_model(target, **content)
                self.client.log_model_artifacts(version.model_id, str(target))
        return True

    def download(self, version: int, folder: Path) -> Path:
        """A version's weights, config and reference, in a folder that `checkpoint.load` reads."""
        with self.store.failures():
            path = self._mlflow.artifacts.download_artifacts(
                f"models:/{self.name}/{version}", dst_path=str(folder)
            )
        return Path(path) / "artifacts"

    def data_of(self, version: Version) -> dict[str, Any]:
        """What a version has on record of its data (data.json); empty where it has nothing."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                with self.store.failures():
                    path = self._mlflow.artifacts.download_artifacts(
                        f"models:/{self.name}/{version.number}/artifacts/data.json", dst_path=folder
                    )
                return read_json(Path(path))
            except (Unreachable, UserError):
                return {}

    def set_record(self, version: int, tags: Mapping[str, str], page: str | None) -> None:
        """Make a version say what `tags` and `page` say, and nothing of ours besides.

        page: the Markdown on its page, cut where MLflow's databases would; None leaves it.
        """
        self.tag(version, tags)
        with self.store.failures():
            present = self.client.get_model_version(self.name, str(version)).tags
            for key in (TAGS & set(present)) - set(tags):
                self.client.delete_model_version_tag(self.name, str(version), key)
        if page is not None:
            if len(page) > LONGEST_PAGE:
                page = page[: LONGEST_PAGE - len(CUT)].rpartition("\n")[0] + CUT
            self.describe(version, page)

    def tag(self, version: int, tags: Mapping[str, str]) -> None:
        """Set those tags of a version that differ."""
        with self.store.failures():
            present = self.client.get_model_version(self.name, str(version)).tags
            for key, value in tags.items():
                if present.get(key) != value[:LONGEST_TAG]:
                    self.client.set_model_version_tag(
                        self.name, str(version), key, value[:LONGEST_TAG]
                    )

    def describe(self, version: int, description: str) -> None:
        """Set a version's description, the Markdown on its page."""
        with self.store.failures():
            if self.client.get_model_version(self.name, str(version)).description != description:
                self.client.update_model_version(self.name, str(version), description)

    def set_champion(self, version: int, how: str) -> None:
        """Move the champion's alias, and write down since when and by what."""
        before = self.alias(CHAMPION)
        if before == version:
            return
        self._move(version, {"version": version, "since": _now(), "by": how})

    def set_challenger(self, version: int) -> None:
        """Put the challenger's alias on a version."""
        with self.store.failures():
            if self.alias(CHALLENGER) != version:
                insist(self.client.set_registered_model_alias, self.name, CHALLENGER, str(version))

    def promote(self, version: int) -> bool:
        """A person's promotion: moves the alias; the gate won't take it back by itself.

        Returns whether another version, or none, was champion before.
        """
        if version not in {entry.number for entry in self.versions()}:
            known = ", ".join(str(entry.number) for entry in self.versions())
            raise UserError(f"{self.name} has no version {version}; there are: {known or 'none'}")
        before = self.alias(CHAMPION)
        self.set_champion(version, "promoted by hand")
        with self.store.failures():
            self.client.delete_model_version_tag(self.name, str(version), TAKEN_BACK_TAG)
        if before is not None and before != version:
            words = f"replaced by version {version} by hand on {_now()[:10]}"
            self.tag(before, {TAKEN_BACK_TAG: words})
        return before != version

    def rollback(self) -> int:
        """Give the alias back to the champion before this one; returns its version."""
        now = self.alias(CHAMPION)
        held = _stack(self.history())
        there = {entry.number for entry in self.versions()}
        before = [number for number in held[:-1] if number in there and number != now]
        if now is None or not before:
            raise UserError(f"{self.name} has no earlier champion to go back to")
        self._move(before[-1], {"version": before[-1], "since": _now(), "by": "rollback"})
        self.tag(now, {TAKEN_BACK_TAG: f"rolled back by hand on {_now()[:10]}"})
        return before[-1]

    def history(self) -> list[dict[str, Any]]:
        """Who was champion, oldest first: version, since, by."""
        return json.loads(self._registered().tags.get(HISTORY_TAG, "[]"))

    def _move(self, version: int, entry: dict[str, Any]) -> None:
        history = [*self.history(), entry][-LONGEST_HISTORY:]
        with self.store.failures():
            insist(self.client.set_registered_model_alias, self.name, CHAMPION, str(version))
            insist(
                self.client.set_registered_model_tag, self.name, HISTORY_TAG, json.dumps(history)
            )
            if self.alias(CHALLENGER) == version:
                self.client.delete_registered_model_alias(self.name, CHALLENGER)

    def _registered(self) -> Any:
        with self.store.failures():
            found = self.client.search_registered_models(f"name='{self.name}'")
            if not found:
                raise UserError(f"{self.store.public_address} has no model {self.name}")
            return self.client.get_registered_model(self.name)


def requirements() -> list[str]:
    """What the registered model needs, pinned to what is installed."""
    return [f"{name}=={installed(name).partition('+')[0]}" for name in REQUIREMENTS]


def _stack(history: list[dict[str, Any]]) -> list[int]:
    """The champions one above the other; a rollback takes the uppermost away."""
    stack: list[int] = []
    for entry in history:
        if entry["by"] == "rollback":
            while stack and stack[-1] != entry["version"]:
                stack.pop()
        else:
            stack.append(entry["version"])
    return stack


@contextmanager
def _packed(
    model: Path, reference: Path, data: Mapping[str, Any], example: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Arguments of pyfunc.log_model and save_model.

    The package `vae` travels as its source files, and nothing else.
    """
    import vae
    from vae.models import CONFIG, WEIGHTS

    discrete = read_json(model / CONFIG)["model"]["space"] != "continuous"
    with tempfile.TemporaryDirectory() as folder:
        code, facts = Path(folder) / "vae", Path(folder) / "data.json"
        skipped = shutil.ignore_patterns("__pycache__", "py.typed", ".*")
        shutil.copytree(Path(vae.__file__).parent, code, ignore=skipped)
        facts.write_text(json.dumps(data, indent=1) + "\n")
        yield {
            "python_model": str(Path(__file__).with_name("served_model.py")),
            "code_paths": [str(code)],
            "artifacts": {
                "weights": str(model / WEIGHTS),
                "config": str(model / CONFIG),
                "reference": str(reference),
                "data": str(facts),
            },
            "signature": _signature(example.shape[1:], discrete),
            "input_example": example.astype("float32" if discrete else "float64"),
            "pip_requirements": requirements(),
            "metadata": dict(data),
        }


def _signature(data_shape: tuple[int, ...], discrete: bool) -> Any:
    """x in, the columns of `score` out, and the parameters of all tasks."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    names = ["log_px", "se", "ess", "khat", *(["bits_per_dim"] if discrete else []), "percentile"]
    dtype = np.dtype("float32" if discrete else "float64")
    return ModelSignature(
        inputs=Schema([TensorSpec(dtype, (-1, *data_shape))]),
        outputs=Schema(
            [
                *(ColSpec(DataType.double, name) for name in names),
                ColSpec(DataType.string, "reason", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("task", DataType.string, "score"),
                ParamSpec("num_samples", DataType.long, None),
                ParamSpec("seed", DataType.long, None),
            ]
        ),
    )


def _version(entry: Any) -> Version:
    return Version(
        number=int(entry.version),
        run_id=entry.run_id,
        tags=dict(entry.tags),
        model_id=entry.model_id or _model_id(entry.source),
    )


def _model_id(source: str) -> str | None:
    """The logged model that a version's source `models:/m-…` names."""
    kind, _, model_id = source.partition("models:/")
    return model_id if kind == "" and "/" not in model_id else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def main() -> None:
    parser = argparse.ArgumentParser(description="Move the champion's alias by hand.")
    move = parser.add_mutually_exclusive_group(required=True)
    move.add_argument("--promote", type=int, metavar="VERSION")
    move.add_argument("--rollback", action="store_true")
    parser.add_argument("--register", type=Path, default=Path("reports/register.json"))
    asked = parser.parse_args()
    from pipeline.params import load_plain_params
    from pipeline.tracking import open_store

    registry = Registry(open_store(load_plain_params()), read_json(asked.register)["model_name"])
    if asked.rollback:
        say(f"champion   of {registry.name} is version {registry.rollback()} again")
    else:
        moved = registry.promote(asked.promote)
        words = "by hand" if moved else "as before"
        say(f"champion   of {registry.name} is version {asked.promote}, {words}")


if __name__ == "__main__":
    run_stage(main)
