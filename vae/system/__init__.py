"""Files, threads and memory of the machine."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from vae.system.files import (
        file_hash as file_hash,
        held as held,
        listed as listed,
        scratch_directory as scratch_directory,
        whole_directory as whole_directory,
    )
    from vae.system.lazy import (
        lazy_face as lazy_face,
    )
    from vae.system.memory import (
        keep_freed_memory as keep_freed_memory,
        samples_at_once as samples_at_once,
    )
    from vae.system.shared_memory import (
        GONE as GONE,
        Piece as Piece,
        SharedMemory as SharedMemory,
        open_shared_memory as open_shared_memory,
    )
    from vae.system.threads import (
        in_threads as in_threads,
    )

__getattr__, __dir__ = lazy_face(__file__)
