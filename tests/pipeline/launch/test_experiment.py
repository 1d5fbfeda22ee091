"""Overlays in experiments/: each is a part of params.yaml that the pipeline accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from pipeline.launch import FOLDER, as_override, read_overlay
from pipeline.params import load_params, read_yaml
from pipeline.stage import UserError

ALL = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", ALL)
def test_the_overlay_is_accepted_on_top_of_params_yaml(name: str, tmp_path: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text())
    for key, value in read_overlay(name).items():
        section, _, field = key.partition(".")
        assert field in content[section], key
        content[section][field] = list(value) if isinstance(value, tuple) else value
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(content))
    load_params(file)


def test_later_overlays_outweigh_what_they_build_on(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("model: {network: mlp, latent_dim: 2}\n")
    (tmp_path / "second.yaml").write_text("base: first\nmodel: {latent_dim: 3}\n")
    assert read_overlay("second", tmp_path) == {"model.network": "mlp", "model.latent_dim": 3}


def test_a_ring_and_a_misspelt_name_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b\n")
    (tmp_path / "b.yaml").write_text("base: a\n")
    with pytest.raises(UserError, match="a builds on b builds on a"):
        read_overlay("a", tmp_path)
    with pytest.raises(UserError, match="there are: a, b"):
        read_overlay("c", tmp_path)


def test_a_section_without_keys_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: 5\n")
    with pytest.raises(UserError, match="training is 5; expected keys and values"):
        read_overlay("a", tmp_path)


@pytest.mark.parametrize(
    "value",
    [None, True, 5, 0.003, 1e-5, "torchvision:MNIST", "two words", (200, 200), ("a", "b:c")],
)
def test_dvc_writes_the_value_that_the_overlay_holds(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("model: {key: before}\n")
    apply_overrides(file, [as_override("model.key", value)])
    assert read_yaml(file).content == {"model": {"key": value}}
