"""`tightbound score | sample | encode | report`: a registered model at the terminal."""

from __future__ import annotations

import argparse
import tempfile
import webbrowser
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from pipeline.score import __main__ as score, champion_uri, fetch, load
from pipeline.stage import UserError, run_stage, say, whole_file

REPORT = Path("reports/report.html")


def score_command(asked: argparse.Namespace) -> None:
    """log p(x) of new data."""
    task = score.Task(num_samples=asked.num_samples, seed=asked.seed)
    score.tell(asked.out, score.score(_uri(asked), asked.data, asked.out, task))


def encode_command(asked: argparse.Namespace) -> None:
    """Posterior means and standard deviations of new data."""
    task = score.Task(name="encode", seed=asked.seed)
    count = score.score(_uri(asked), asked.data, asked.out, task)
    columns = len(pq.read_schema(asked.out).names) - 1
    say(f"encode     {asked.out}: {count:,} examples, {columns // 2} latent means and deviations")


def sample_command(asked: argparse.Namespace) -> None:
    """New examples from the model: a picture (.png), arrays (.npz) or a table (.csv)."""
    kinds = (".png", ".npz", ".csv")
    if asked.out.suffix not in kinds:
        raise UserError(f"--out: expected a name that ends in {', '.join(kinds)}, got {asked.out}")
    with tempfile.TemporaryDirectory() as folder:
        model = fetch(_uri(asked), Path(folder))
        params = {"task": "sample", "num_samples": asked.num_samples, "seed": asked.seed}
        x = load(model.folder).predict(np.zeros(1), params=params)
    with whole_file(asked.out) as fresh:
        if asked.out.suffix == ".npz":
            with fresh.open("wb") as file:
                np.savez(file, x=x)
        elif asked.out.suffix == ".csv":
            pd.DataFrame(x.reshape(len(x), -1), columns=model.columns).to_csv(fresh, index=False)
        else:
            _draw(x, model.space, fresh)
    say(f"sample     {asked.out}: {len(x):,} examples, seed {asked.seed}")


def _draw(x: np.ndarray, space: str, path: Path) -> None:
    if x.ndim != 4 or space == "continuous":
        raise UserError("--out: a table is no picture; expected .npz or .csv")
    import torch
    from PIL import Image

    from pipeline.evaluate import to_images
    from pipeline.figures import mosaic

    images = to_images(torch.from_numpy(x), space)
    page = mosaic(images, columns=int(np.ceil(np.sqrt(len(images)))))
    Image.fromarray(np.rint(255 * page).astype(np.uint8)).save(path, format="PNG")


def report_command(asked: argparse.Namespace) -> None:
    """The report page, in the browser where there is one."""
    if not REPORT.is_file():
        raise UserError(f"{REPORT} is not there yet; `make run` makes it")
    say(f"report     {REPORT.resolve()}")
    webbrowser.open(REPORT.resolve().as_uri())


def _uri(asked: argparse.Namespace) -> str:
    return asked.model or champion_uri()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="tightbound", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="score | sample | encode | report")
    for name, run in (("score", score_command), ("encode", encode_command)):
        one = commands.add_parser(name, help=(run.__doc__ or "").rstrip("."))
        score.add_arguments(one)
        one.set_defaults(run=run)
        if name == "score":
            one.add_argument("--num-samples", type=int, help="K; default: the percentiles' own")
    one = commands.add_parser("sample", help=(sample_command.__doc__ or "").rstrip("."))
    one.add_argument("--model", help="models:/NAME@champion (the default), models:/NAME/3 or …")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--num-samples", type=int, default=64)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=sample_command)
    one = commands.add_parser("report", help=(report_command.__doc__ or "").rstrip("."))
    one.set_defaults(run=report_command)
    return top


def main() -> None:
    """The console command."""
    asked = parser().parse_args()
    run_stage(lambda: asked.run(asked))


if __name__ == "__main__":
    main()
