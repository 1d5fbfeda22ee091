"""The stage `prepare`: a data source becomes splits in Parquet."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.prepare.__main__ import (
        chosen as chosen,
        prepare as prepare,
    )
    from pipeline.prepare.splits import (
        assign_splits as assign_splits,
        content_hashes as content_hashes,
        count_duplicates as count_duplicates,
    )
    from pipeline.prepare.values import (
        binarize as binarize,
        check_columns as check_columns,
        check_space as check_space,
        fill_missing as fill_missing,
    )

__getattr__, __dir__ = lazy_face(__file__)
