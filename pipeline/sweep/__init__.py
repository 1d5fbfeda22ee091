"""The stage `sweep`: which latent dimension, which likelihood."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.sweep.__main__ import (
        sweep as sweep,
    )
    from pipeline.sweep.journal import (
        Journal as Journal,
        Trial as Trial,
        job_at as job_at,
        trial_id as trial_id,
    )
    from pipeline.sweep.points import (
        draw_points as draw_points,
        grid as grid,
    )
    from pipeline.sweep.run_trials import (
        Resources as Resources,
    )
    from pipeline.sweep.search import (
        Space as Space,
        known_points as known_points,
        planned as planned,
        tune_arguments as tune_arguments,
    )

__getattr__, __dir__ = lazy_face(__file__)
