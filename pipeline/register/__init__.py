"""The stage `register`: the gate and the model registry."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.register.__main__ import (
        Paths as Paths,
        is_stale as is_stale,
        register as register,
    )
    from pipeline.register.comparable import (
        Conversion as Conversion,
        DataRecord as DataRecord,
        NotComparable as NotComparable,
        conversion as conversion,
    )
    from pipeline.register.gate import (
        Comparison as Comparison,
        Situation as Situation,
        decide as decide,
        paired_gain as paired_gain,
    )
    from pipeline.register.record import (
        EVIDENCE_KEYS as EVIDENCE_KEYS,
        TAGS as TAGS,
        is_weaker as is_weaker,
        stored_record as stored_record,
    )
    from pipeline.register.registry import (
        LONGEST_PAGE as LONGEST_PAGE,
        REQUIREMENTS as REQUIREMENTS,
        TAKEN_BACK_TAG as TAKEN_BACK_TAG,
        Registry as Registry,
        requirements as requirements,
    )
    from pipeline.register.served_model import (
        MOST_BYTES as MOST_BYTES,
        MOST_VALUES as MOST_VALUES,
        ScoredVAE as ScoredVAE,
        to_array as to_array,
    )

__getattr__, __dir__ = lazy_face(__file__)
