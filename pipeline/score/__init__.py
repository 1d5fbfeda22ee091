"""`tightbound score`: log p(x) of files of any size."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.score.__main__ import (
        Task as Task,
        score as score,
    )
    from pipeline.score.inputs import (
        open_input as open_input,
    )
    from pipeline.score.packed_model import (
        PackedModel as PackedModel,
        champion_uri as champion_uri,
        describe as describe,
        fetch as fetch,
        load as load,
    )
    from pipeline.score.worker import (
        write_part as write_part,
    )

__getattr__, __dir__ = lazy_face(__file__)
