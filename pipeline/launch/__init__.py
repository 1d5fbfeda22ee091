"""What starts a run: here, as an experiment, on a cluster."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.launch.experiment import (
        FOLDER as FOLDER,
        as_override as as_override,
        read_overlay as read_overlay,
    )
    from pipeline.launch.job import (
        decode_lock as decode_lock,
        encode_lock as encode_lock,
        environment_fault as environment_fault,
    )
    from pipeline.launch.submit import (
        forwarded as forwarded,
    )
    from pipeline.launch.upload import (
        Tree as Tree,
        check_nothing_is_lost as check_nothing_is_lost,
        remote_name as remote_name,
        run_dvc as run_dvc,
    )

__getattr__, __dir__ = lazy_face(__file__)
