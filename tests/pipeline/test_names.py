"""Names are data: columns, classes and files may be called anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.evaluate import __main__ as evaluate
from pipeline.figures import panels, plain, save, to_svg
from pipeline.params import EvaluateParams
from pipeline.prepare import prepare
from pipeline.report import model_card
from pipeline.stage import load_meta, load_split
from tests.pipeline import builders
from vae.models import VAE, VAEConfig, save as save_model

EVIL = [
    "gdp_$_per_$_aid", "$0 - $25,000", "_hidden", "__init__", "a|b", "*bold*", "`code`",
    "<b>x</b>", "</script><script>alert(1)</script>", "[link](http://x)", "{{ 7*7 }}", "{% if %}",
    "${data.root}", "%s %d %%", "{0}{name}", "back\\slash \\$", "quote\"'", "a/b/../c", "CON",
    "-rf", "name.with.dots", "中文列名", "עברית", "é ü ñ", "🙂", "x" * 300, "a\u202eb", "#hash",
    "a&b;",     r"\frac{1}{2}", "$", "$$", "^_{}", "~", "tab\tin", "~/x",
]  # fmt: skip


def table(names: list[str], rows: int = 80) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({name: rng.normal(size=rows) for name in names})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of columns and classes with every name, prepared and evaluated for real."""
    folder = tmp_path_factory.mktemp("names") / "a folder $of$ {names}"
    folder.mkdir()
    frame = table(EVIL).assign(kind=[EVIL[i % len(EVIL)] for i in range(80)])
    frame.to_csv(folder / "t_$_.csv", index=False)
    data = replace(
        builders.TABLE, root=str(folder / "t_$_.csv"), label="kind", valid_fraction=0.25,
        test_fraction=0.25,
    )  # fmt: skip
    prepare(data, folder / "prepared")
    meta = load_meta(folder / "prepared")
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=meta.data_shape,
        space="continuous",
        latent_dim=2,
        likelihood="gaussian",
        hidden=(4,),
    )
    save_model(VAE(config), folder / "model")
    rows = [builders.epoch_row(epoch) for epoch in (1, 2)]
    builders.write_csv(folder / "train" / "history.csv", rows)
    settings = EvaluateParams(
        num_importance_samples=50, target_se=None, proposal="encoder", precision="fp32", seed=0
    )
    evaluate.evaluate(
        settings, folder / "prepared", folder / "model", folder / "train", folder / "evaluate"
    )
    return folder


def test_they_are_kept_as_they_are(evaluated: Path) -> None:
    meta = load_meta(evaluated / "prepared")
    assert list(meta.columns or ()) == [name.strip() for name in EVIL]
    assert set(meta.classes or ()) == {name.strip() for name in EVIL}
    assert len(load_split(evaluated / "prepared", "train")) > 30


def test_no_picture_is_lost_to_a_name(evaluated: Path) -> None:
    names = {path.stem for path in (evaluated / "evaluate").glob("*.png")}
    assert names == {"reconstructions", "samples", "traversals", "histogram", "elbo_curves",
                     "ladder", "activity", "latent_space"}  # fmt: skip


def words_of(figure: Any) -> str:
    return to_svg(figure, "f")


@pytest.mark.parametrize("name", ["$0 - $25,000", "_hidden", "a_$_b_$_c", r"\$x$", "50 % & <b>"])
def test_a_figure_shows_a_name_as_it_is(name: str) -> None:
    import html

    points = np.random.default_rng(0).normal(size=(20, 2))
    shown = words_of(panels.latent_figure(points, [name, "other"] * 10, ("a", "b")))
    assert html.escape(name, quote=False) in shown
    x = np.random.default_rng(0).normal(size=(20, 1))
    shown = words_of(panels.table_samples(x, x, [name]))
    assert html.escape(name, quote=False) in shown
    steps = np.linspace(-3, 3, 5)
    shown = words_of(panels.table_traversals(steps, np.zeros((1, 5, 1)), [0], [name]))
    assert html.escape(name, quote=False) in shown


@pytest.mark.parametrize("name", EVIL)
def test_any_name_can_be_drawn(name: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 1))
    save(panels.table_samples(x, x, [name]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_long_names_and_line_breaks_stay_in_their_place() -> None:
    assert plain("x" * 300) == "x" * 39 + "…"
    assert plain("a\nb\tc") == "a b c"


@pytest.mark.parametrize("name", EVIL)
def test_the_page_of_a_version_is_markdown_whatever_the_names(name: str) -> None:
    meta = {"dataset": "d", "space": "continuous", "data_shape": [1], "hash": "h",
            "repeated_columns": [name], "filled": {name: 1.5}}  # fmt: skip
    rows = [(key, model_card.literal(value)) for key, value in model_card.data_rows(meta)]
    lines = model_card._table("Data", rows).split("\n")
    for line in lines[4:]:
        unescaped = line.replace("\\\\", "")
        assert unescaped.count("|") - unescaped.count("\\|") == 3
        for sign in "*`<>[]$~":
            assert unescaped.count(sign) == unescaped.count(f"\\{sign}"), line


def test_meta_json_and_metrics_are_json(evaluated: Path) -> None:
    for path in (evaluated / "evaluate").glob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
