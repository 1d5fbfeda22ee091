"""`python -m pipeline.params`: is params.yaml right?"""

from __future__ import annotations

from pipeline.params.remembered import is_known_as_right, remembered_as_right
from pipeline.stage import run_stage


def main() -> None:
    """Check params.yaml in this folder; silent when it is right, and at once when it is known."""
    if is_known_as_right():
        return
    from pipeline.params.load import load_params

    with remembered_as_right():
        load_params()


if __name__ == "__main__":
    run_stage(main)
