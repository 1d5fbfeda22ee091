"""Ray: connection, storage, runs."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.cluster.connect import (
        data_context as data_context,
    )
    from pipeline.cluster.shared_folders import (
        require_seen as require_seen,
        require_shared as require_shared,
        unseen as unseen,
    )
    from pipeline.cluster.storage import (
        S3 as S3,
        STORAGE_VARIABLE as STORAGE_VARIABLE,
        Held as Held,
        Storage as Storage,
        download as download,
        open_storage as open_storage,
        storage_at as storage_at,
    )
    from pipeline.cluster.worker_faults import (
        DEATH as DEATH,
        SILENCE as SILENCE,
        fault_of_a_worker as fault_of_a_worker,
    )

__getattr__, __dir__ = lazy_face(__file__)
