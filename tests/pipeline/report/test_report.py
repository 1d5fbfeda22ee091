"""The page says what the files say, asks the network for nothing, and opens in a browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.figures import MINUS, sweep_plot
from pipeline.report import read_inputs, render, report, verdict, warning
from pipeline.report.__main__ import main
from pipeline.stage import UserError
from tests.pipeline import builders

MODEL = {
    "data_shape": [1, 4, 4], "space": "grey8", "latent_dim": 2, "network": "mlp",
    "likelihood": "discretized_logistic", "hidden": [200, 200], "activation": "tanh",
    "posterior": "diagonal", "prior": "normal", "min_scale": 0.001,
}  # fmt: skip
OBJECTIVE = {"name": "iwae", "num_samples": 5, "beta": 1.0, "beta_warmup_epochs": 0}
BASELINE = {
    "name": "factor analysis with 2 factors", "log_px": -120.0, "bits_per_dim": 10.82,
    "gain": 22.5, "gain_se": 1.5, "gain_in_se": 15.0,
}  # fmt: skip
ARGUMENTS = ("prepared", "selfcheck", "sweep", "train", "evaluate", "register")


@pytest.fixture
def outputs(tmp_path) -> dict[str, Path]:
    """Every other stage's output; the model is the champion."""
    paths = {
        name: tmp_path / (f"{name}.json" if name in ("selfcheck", "register") else name)
        for name in ARGUMENTS
    }
    builders.write_json(paths["prepared"] / "meta.json", {
        "dataset": "toy<b>", "source": "toy", "space": "grey8", "binarization": None,
        "data_shape": [1, 4, 4], "counts": {"train": 1200, "valid": 100, "test": 40},
        "hash": "d" * 64,
    })  # fmt: skip
    checks = [{"name": "exact", "expected": -1.5, "found": -1.49, "tolerance": 0.1, "passed": True}]
    builders.write_json(paths["selfcheck"], {"passed": True, "checks": checks})
    sweep = builders.sweep_outputs(paths["sweep"])
    points = pd.read_csv(sweep / "points.csv")
    points.assign(valid_elbo=points["valid_elbo"] * 30).to_csv(sweep / "points.csv", index=False)
    builders.write_json(sweep / "best.json", {
        "model": MODEL, "objective": OBJECTIVE, "selected_by": "valid_bits_per_dim",
        "score": 2.02, "trial_id": "t2",
    })  # fmt: skip
    builders.train_outputs(paths["train"], builders.model_stub(tmp_path / "model"))
    builders.write_json(paths["train"] / "metrics.json", {
        "epochs": 5, "best_epoch": 4, "valid_elbo": -96.5, "seconds": 75.2,
        "images_per_s": 1234.5, "num_workers": 2,
    })  # fmt: skip
    metrics = builders.evaluate_metrics(
        khat_median=0.3, khat_bad_fraction=0.05, baseline=BASELINE, collapse="no collapse: 2 of 2"
    )
    builders.write_json(paths["evaluate"] / "metrics.json", metrics)
    log_px = np.linspace(-105.0, -90.0, 40)
    pd.DataFrame(
        {"id": [f"x{i}" for i in range(40)], "log_px": log_px, "baseline_log_px": log_px - 22.5}
        | {"ess": np.linspace(5, 40, 40), "khat": np.linspace(-0.1, 0.75, 40)}
    ).to_parquet(paths["evaluate"] / "per_example.parquet")
    sweep_plot(points, paths["evaluate"] / "reconstructions.png")
    sweep_plot(points, paths["evaluate"] / "latent_space.png")
    register(paths)
    return paths


def register(paths: dict[str, Path], **changes) -> None:
    content = {
        "model_name": "tightbound-toy-grey8", "version": 3, "alias": "champion",
        "verdict": "champion", "reasons": ["it is the first: there was no champion"], "gain": None,
        "gain_se": None, "weights_hash": "ab" * 32, "tracking_uri": "sqlite:////a/mlflow.db",
        "run_id": "r1", "khat_bad_fraction": 0.05,
    }  # fmt: skip
    builders.write_json(paths["register"], content | changes)


def change_metrics(paths: dict[str, Path], **changes) -> None:
    path = paths["evaluate"] / "metrics.json"
    builders.write_json(path, json.loads(path.read_text()) | changes)


def load(paths: dict[str, Path]):
    return read_inputs(*(paths[name] for name in ARGUMENTS))


class Page(HTMLParser):
    """The visible text, and every attribute that names a resource."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.resources: list[str] = []
        self.tags: list[str] = []
        self.hidden = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.hidden += tag in ("style", "script")
        self.resources += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag):
        self.hidden -= tag in ("style", "script")

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_verdict_of_a_champion(outputs):
    assert verdict(load(outputs)) == (
        f"tightbound-toy-grey8, version 3, is the champion: log p(x) = {MINUS}97.50 ± 1.25 nats "
        "(8.7900 ± 0.1100 bits/dim) on 40 test examples, 22.5 nats better than factor analysis "
        "with 2 factors, 15.0 standard errors of the paired difference."
    )


def test_verdict_of_a_challenger_in_a_continuous_space(outputs):
    register(outputs, alias="challenger", version=4)
    worse = BASELINE | {"gain": -3.0, "gain_in_se": -2.0, "bits_per_dim": None}
    change_metrics(outputs, bits_per_dim=None, bits_per_dim_se=None, baseline=worse)
    words = verdict(load(outputs))
    assert "version 4, is a challenger, not the champion" in words
    assert "bits/dim" not in words
    assert "3.0 nats worse than factor analysis" in words


def test_the_page_begins_with_the_verdict_and_has_every_part(outputs):
    page = Page(render(load(outputs)))
    assert page.tags.count("h1") == 1
    start = page.text.index("tightbound-toy-grey8, version 3, is the champion")
    for heading in ("Sweep", "Training", "Evidence", "Latent space and collapse", "Pictures",
                    "Self-check of the estimators", "Model card", "Provenance"):  # fmt: skip
        start = page.text.index(heading, start)


def test_the_page_says_what_the_files_say(outputs):
    text = Page(render(load(outputs))).text
    for words in (
        "2.020 ± 0.010",  # the best trial
        "gaussian, latent dimension 8: loss became NaN",
        "5 epochs in 1 min 15 s on 2 data-parallel workers (1,234 examples/s)",
        "epoch 4 are kept",
        f"{MINUS}120.00",  # the baseline
        "22.5 ± 1.5",
        "1 of 1 checks passed",
        "training 1,200, validation 100, test 40",
        "iwae, K = 5",
        "d" * 64,
        "ab" * 32,
        'mlflow.pyfunc.load_model("models:/tightbound-toy-grey8@champion")',
        "No collapse: 2 of 2.",
        "it is the first: there was no champion",
    ):
        assert words in text, words


def test_untrustworthy_evidence_is_said_at_the_top(outputs):
    assert warning(load(outputs)) == ""
    change_metrics(outputs, khat_bad_fraction=0.25)
    text = Page(render(load(outputs))).text
    assert "khat exceeds 0.7 on 25.0% of the test examples" in text
    assert text.index("khat exceeds 0.7 on 25.0%") < text.index("Sweep")


def test_a_failed_selfcheck_is_shown(outputs):
    checks = [{"name": "a", "expected": 1, "found": 2, "tolerance": 0.1, "passed": False}]
    builders.write_json(outputs["selfcheck"], {"passed": False, "checks": checks})
    assert "0 of 1 checks passed" in Page(render(load(outputs))).text


def test_binary_data_show_both_baselines_in_nats(outputs):
    meta = json.loads((outputs["prepared"] / "meta.json").read_text())
    changed = meta | {"space": "binary", "binarization": "dynamic"}
    builders.write_json(outputs["prepared"] / "meta.json", changed)
    other = BASELINE | {"name": "independent Bernoulli values", "log_px": -200.0}
    change_metrics(outputs, baselines={"a": BASELINE, "b": other})
    text = Page(render(load(outputs))).text
    assert f"independent Bernoulli values {MINUS}200.00" in text
    assert "dynamic binarisation" in text
    assert "97.0 ± 0.5" in text  # the sweep, in nats


def test_a_pinned_sweep(outputs):
    for name in ("trials.csv", "points.csv"):
        table = pd.read_csv(outputs["sweep"] / name).iloc[:1]
        empty = [c for c in table if c.startswith("valid_") or c in ("num_samples", "error")]
        table[empty] = np.nan
        table.assign(status="pinned").to_csv(outputs["sweep"] / name, index=False)
    text = Page(render(load(outputs))).text
    assert "Nothing was swept: params.yaml pins the likelihood to discretized_logistic" in text


def test_few_samples_have_no_khat(outputs):
    change_metrics(outputs, khat_median=None, khat_bad_fraction=None, log_px_mc_se=None)
    table = pd.read_parquet(outputs["evaluate"] / "per_example.parquet").assign(khat=np.nan)
    table.to_parquet(outputs["evaluate"] / "per_example.parquet")
    assert "n/a examples with khat > 0.7" in Page(render(load(outputs))).text


def test_nothing_comes_from_the_network(outputs):
    html = render(load(outputs))
    page = Page(html)
    assert page.resources
    assert all(resource.startswith(("data:", "#")) for resource in page.resources)
    assert page.tags.count("script") == 1  # the page's own, which its policy names by hash
    script = html[html.index("<script>") + len("<script>") : html.index("</script>")]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'\"" in html
    assert "fetch" not in script
    assert "url(http" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_plots_tell_their_values_under_the_pointer(outputs):
    html = render(load(outputs))
    told = re.findall(r'data-tip="([^"]+)"', html)
    assert "discretized_logistic, 2 latent dimensions\n2.0200 ± 0.0100 bits/dim" in told
    assert f"epoch 4\ntraining {MINUS}95.00\nvalidation {MINUS}97.00" in told
    assert f"K = 10\n{MINUS}98.50 nats\nELBO +1.50" in told
    both = [re.search(r"nats\nmodel: (\d+) ex.*\nbaseline: (\d+)", words) for words in told]
    counts = [tuple(map(int, found.groups())) for found in both if found]
    assert [sum(column) for column in zip(*counts, strict=True)] == [40, 40]


def test_ids_are_unique_and_references_resolve(outputs):
    html = render(load(outputs))
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_names_from_outside_are_escaped(outputs):
    html = render(load(outputs))
    assert "toy<b>" not in html
    assert "toy&lt;b&gt;" in html


def test_a_missing_file_is_named_and_nothing_is_written(outputs, tmp_path, monkeypatch):
    (outputs["evaluate"] / "per_example.parquet").unlink()
    arguments = [word for name in ARGUMENTS for word in (f"--{name}", str(outputs[name]))]
    out = tmp_path / "report.html"
    monkeypatch.setattr("sys.argv", ["report", *arguments, "--report", str(out)])
    with pytest.raises(UserError, match=r"per_example\.parquet is missing; `dvc repro` makes it"):
        main()
    assert not out.exists()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--v=0",
)  # fmt: skip
PROBE = """<body style="margin:0"><iframe id="page" src="report.html" width="{width}" height="900"
style="border:0"></iframe><script>
onload = () => {{
  const root = document.getElementById("page").contentDocument.documentElement;
  const wide = [...root.querySelectorAll("main *")].filter(
    e => !e.closest("svg") && e.getBoundingClientRect().right >
      Math.min(root.clientWidth, e.closest(".card")?.getBoundingClientRect().right ?? 1e9) + 1);
  const told = new Set(), page = root.ownerDocument;
  for (const plot of root.querySelectorAll("svg:has([data-tip])")) {{
    const part = plot.querySelector("[data-tip] > path");
    part.scrollIntoView({{block: "center", behavior: "instant"}});
    const {{left, top, width, height}} = part.getBoundingClientRect();
    const at = {{clientX: left + width / 2, clientY: top + height / 2}};
    const move = new Event("pointermove", {{bubbles: true}});
    page.elementFromPoint(at.clientX, at.clientY).dispatchEvent(Object.assign(move, at));
    const hover = page.getElementById("hover"), box = hover.getBoundingClientRect();
    if (box.left >= 0 && box.right <= root.clientWidth) told.add(hover.innerText);
  }}
  document.body.append(document.createElement("pre"));
  document.querySelector("pre").textContent = [...told].join("; ");
  document.title = (root.scrollWidth - root.clientWidth) + " px and " + wide.length + " too wide";
}}</script>"""


def browse(folder: Path, width: int) -> subprocess.CompletedProcess[str]:
    """Open probe.html, which measures report.html; its title says the result."""
    assert CHROMIUM is not None
    (folder / "probe.html").write_text(PROBE.format(width=width))
    command = [
        CHROMIUM, *FLAGS, "--allow-file-access-from-files", f"--user-data-dir={folder}/profile",
        f"--window-size={width + 200},1000", "--dump-dom", f"file://{folder}/probe.html",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_it_without_errors_or_sideways_scrolling(outputs, tmp_path, width):
    report(load(outputs), tmp_path / "report.html")
    done = browse(tmp_path, width)
    assert "<title>0 px and 0 too wide</title>" in done.stdout
    told = done.stdout[done.stdout.index("<pre>") :]
    for words in ("2 latent dimensions\n2.0200", "epoch 1\n", "K = 1\n", "effective", "khat"):
        assert words in told
    assert ":CONSOLE" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_browser_test_can_fail(outputs, tmp_path):
    page = render(load(outputs))
    spoilt = '<p style="width:2000px">wide</p><img src="https://example.invalid/a.png"></main>'
    (tmp_path / "report.html").write_text(page.replace("</main>", spoilt))
    done = browse(tmp_path, 390)
    assert "<title>0 px" not in done.stdout
    assert ":CONSOLE" in done.stderr
