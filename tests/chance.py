"""Which of many costly cases run: a third chosen by seed, or all of them in `make soak`."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")

SOAK = os.environ.get("TIGHTBOUND_SOAK") == "1"
KILLS = int(os.environ.get("TIGHTBOUND_KILLS", "20" if SOAK else "2"))  # of each kind
# By default another third each day; pytest's header shows the seed, to repeat it.
SEED = int(os.environ.get("TIGHTBOUND_SEED", int(time.time()) // 86_400))


def a_third(cases: Sequence[Case]) -> list[Case]:
    """A third of the cases, in their order; under `TIGHTBOUND_SOAK=1` all."""
    if SOAK:
        return list(cases)
    chosen = random.Random(SEED).sample(range(len(cases)), -(-len(cases) // 3))
    return [cases[index] for index in sorted(chosen)]
