"""The stage `report`: one page of what a run found."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.report.__main__ import (
        render as render,
        report as report,
    )
    from pipeline.report.inputs import (
        read_inputs as read_inputs,
    )
    from pipeline.report.sections import (
        verdict as verdict,
        warning as warning,
    )

__getattr__, __dir__ = lazy_face(__file__)
