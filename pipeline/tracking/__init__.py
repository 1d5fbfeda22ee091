"""MLflow mirrors what the stages wrote."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.tracking.mirror import (
        ENSURE_FOLLOWS_VARIABLE as ENSURE_FOLLOWS_VARIABLE,
    )
    from pipeline.tracking.send import (
        EPOCH_METRICS as EPOCH_METRICS,
        open_store as open_store,
    )
    from pipeline.tracking.store import (
        COMMIT_VARIABLE as COMMIT_VARIABLE,
        URI_VARIABLE as URI_VARIABLE,
        Point as Point,
        Store as Store,
        Unreachable as Unreachable,
        another_may_be_faster as another_may_be_faster,
        flatten as flatten,
        git_commit as git_commit,
        import_mlflow as import_mlflow,
        insist as insist,
        known_runs as known_runs,
        set_environment as set_environment,
        store_address as store_address,
        without_password as without_password,
    )

__getattr__, __dir__ = lazy_face(__file__)
