"""Report stage: one self-contained page about the model and the evidence for it.

Reads what the other stages wrote: data/prepared/meta.json, reports/selfcheck.json,
reports/sweep, reports/train, reports/evaluate, reports/register.json.
Writes reports/report.html: no requests, pictures inside; light and dark.

Plots are SVG with the values under the pointer by a script of a few lines (hover.js), rather
than Vega's 0.8 MB, which would also need a page that may evaluate text as code.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from pipeline.params import load_plain_params
from pipeline.report import sections
from pipeline.report.inputs import Inputs, read_inputs
from pipeline.report.model_card import limits
from pipeline.report.sweep_section import sweep_section
from pipeline.stage import run_stage, say, whole_file
from pipeline.tracking import mirror as tracking
from vae.trust import KHAT_LIMIT

TEMPLATE, SCRIPT = "template.html", "hover.js"


def render(inputs: Inputs) -> str:
    """Return the page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source, script = (
        resources.files("pipeline.report").joinpath(name).read_text(encoding="utf-8")
        for name in (TEMPLATE, SCRIPT)
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    champion = inputs.register.get("alias") == "champion"
    return environment.from_string(source).render(
        title=f"{inputs.meta['dataset']} ({inputs.meta['space']}): VAE report",
        dataset=f"{inputs.meta['dataset']}, {inputs.meta['space']}",
        script=script,
        khat_limit=KHAT_LIMIT,
        script_hash=f"sha256-{digest}",
        champion=champion,
        badge=sections.badge(inputs.register),
        verdict=sections.verdict(inputs),
        warning=sections.warning(inputs),
        reasons=inputs.register.get("reasons", []),
        tiles=sections.tiles(inputs),
        sweep=sweep_section(inputs),
        training=sections.training_section(inputs),
        evidence=sections.evidence_section(inputs),
        collapse=sections.collapse_section(inputs),
        pictures=sections.pictures(inputs, sections.PICTURES),
        latent_pictures=sections.pictures(inputs, sections.LATENT_PICTURES),
        selfcheck=sections.selfcheck_section(inputs.selfcheck),
        card=sections.card_section(inputs),
        loading=sections.loading(inputs),
        loading_note=(
            "The model loads offline, without this project, wherever its pinned requirements are "
            "installed; tasks are score, encode, decode, reconstruct and sample."
        ),
        limits=limits(inputs.metrics, inputs.meta["space"]),
        provenance=sections.provenance(inputs),
    )


def report(inputs: Inputs, out: Path) -> None:
    """Write the page to `out`, whole or not at all."""
    page = render(inputs)
    with whole_file(out) as fresh:
        fresh.write_text(page, encoding="utf-8")
    say(f"report     {out} ({len(page.encode()) / 1e6:.1f} MB): {sections.verdict(inputs)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="pipeline.report", description=__doc__)
    parser.add_argument("--prepared", type=Path, default=Path("data/prepared"))
    parser.add_argument("--selfcheck", type=Path, default=Path("reports/selfcheck.json"))
    parser.add_argument("--sweep", type=Path, default=Path("reports/sweep"))
    parser.add_argument("--train", type=Path, default=Path("reports/train"))
    parser.add_argument("--evaluate", type=Path, default=Path("reports/evaluate"))
    parser.add_argument("--register", type=Path, default=Path("reports/register.json"))
    parser.add_argument("--report", type=Path, default=Path("reports/report.html"))
    paths = parser.parse_args()
    inputs = read_inputs(
        paths.prepared, paths.selfcheck, paths.sweep, paths.train, paths.evaluate, paths.register
    )
    report(inputs, paths.report)
    tracking.mirror_report(load_plain_params(), paths.report, paths.train)


if __name__ == "__main__":
    run_stage(main)
