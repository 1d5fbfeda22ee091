"""`python -m pipeline.params`: is params.yaml right?"""

from __future__ import annotations

from pipeline.params import remembered
from pipeline.params.load import load_params
from pipeline.stage import run_stage


def main() -> None:
    """Check params.yaml in this folder; silent when it is right."""
    with remembered.remembered_as_right():
        load_params()


if __name__ == "__main__":
    run_stage(main)
