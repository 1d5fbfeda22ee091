"""What every stage is made of: files, faults, the terminal."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.stage.faults import (
        UserError as UserError,
        fault_of_the_disk as fault_of_the_disk,
        full_disk as full_disk,
        is_full_disk as is_full_disk,
    )
    from pipeline.stage.files import (
        project_root as project_root,
        read_json as read_json,
        whole_file as whole_file,
        write_json as write_json,
    )
    from pipeline.stage.prepared_data import (
        MEGABYTE as MEGABYTE,
        SPLITS as SPLITS,
        Meta as Meta,
        Split as Split,
        content_hash as content_hash,
        load_meta as load_meta,
        load_split as load_split,
        read_shard as read_shard,
        shard_paths as shard_paths,
        shard_rows as shard_rows,
        training_mb as training_mb,
        write_prepared as write_prepared,
        write_shards as write_shards,
    )
    from pipeline.stage.run import (
        EXPERIMENT_VARIABLE as EXPERIMENT_VARIABLE,
        end_process as end_process,
        run_stage as run_stage,
        spared as spared,
    )
    from pipeline.stage.terminal import (
        QUIET as QUIET,
        VERBOSITY_VARIABLE as VERBOSITY_VARIABLE,
        advance as advance,
        duration as duration,
        say as say,
        steps as steps,
    )

__getattr__, __dir__ = lazy_face(__file__)
