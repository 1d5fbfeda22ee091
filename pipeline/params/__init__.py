"""params.yaml: its keys, their types and ranges, their faults."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.params.load import (
        Params as Params,
        load_params as load_params,
    )
    from pipeline.params.remembered import (
        remembered_as_right as remembered_as_right,
    )
    from pipeline.params.sections import (
        SOURCE_NAMES as SOURCE_NAMES,
        DataParams as DataParams,
        EvaluateParams as EvaluateParams,
        PlainParams as PlainParams,
        ScalingParams as ScalingParams,
        SweepParams as SweepParams,
    )
    from pipeline.params.sweep_axes import (
        LATENT_DIM as LATENT_DIM,
        LIKELIHOOD as LIKELIHOOD,
        Axis as Axis,
        Point as Point,
        Range as Range,
        combinations as combinations,
        describe as describe,
        in_words as in_words,
        read_axis as read_axis,
        section_values as section_values,
    )
    from pipeline.params.value_types import (
        shown as shown,
    )
    from pipeline.params.without_torch import (
        load_plain_params as load_plain_params,
    )
    from pipeline.params.yaml_file import (
        read_yaml as read_yaml,
    )

__getattr__, __dir__ = lazy_face(__file__)
