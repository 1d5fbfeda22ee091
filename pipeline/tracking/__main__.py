"""`python -m pipeline.tracking --sync`: send MLflow what it missed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.stage import run_stage, say
from pipeline.tracking.store import (
    store_address,
)

if TYPE_CHECKING:
    pass
from pipeline.tracking.mirror import sync


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring MLflow up to date with the outputs.")
    parser.add_argument("--sync", action="store_true", required=True)
    parser.add_argument("--sweep", type=Path, default=Path("reports/sweep"))
    parser.add_argument("--model", type=Path, default=Path("models/vae"))
    parser.add_argument("--train", type=Path, default=Path("reports/train"))
    parser.add_argument("--evaluate", type=Path, default=Path("reports/evaluate"))
    parser.add_argument("--report", type=Path, default=Path("reports/report.html"))
    paths = parser.parse_args()
    from pipeline.params import load_plain_params

    params = load_plain_params()
    done = sync(
        params,
        sweep=paths.sweep,
        model=paths.model,
        train=paths.train,
        evaluate=paths.evaluate,
        report=paths.report,
    )
    where = store_address(params.tracking.uri)
    say(f"sync       {', '.join(done) or 'nothing'} mirrored in {where}")


if __name__ == "__main__":
    run_stage(main)
