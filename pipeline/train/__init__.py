"""The stage `train`: one model, data-parallel, from Ray Train."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.train.__main__ import (
        chosen_training as chosen_training,
        train as train,
    )
    from pipeline.train.progress import (
        EpochLog as EpochLog,
        follow as follow,
    )
    from pipeline.train.worker import (
        STATE as STATE,
        TrainingArrays as TrainingArrays,
        TrainingJob as TrainingJob,
        build_model as build_model,
        checkpoint_folder as checkpoint_folder,
        load_arrays as load_arrays,
        start_or_resume as start_or_resume,
        train_worker as train_worker,
    )

__getattr__, __dir__ = lazy_face(__file__)
