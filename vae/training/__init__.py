"""`fit`, a plain loop over epochs, its settings and its checkpoints."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from vae.training.checkpoint import (
        load_state as load_state,
        save_state as save_state,
    )
    from vae.training.config import (
        TrainingConfig as TrainingConfig,
    )
    from vae.training.state import (
        DivergenceError as DivergenceError,
        TrainingState as TrainingState,
    )
    from vae.training.trainer import (
        Trainer as Trainer,
        fit as fit,
    )

__getattr__, __dir__ = lazy_face(__file__)
