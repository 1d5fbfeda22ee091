"""How figures look, and the figures of stages."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.figures.panels import (
        mosaic as mosaic,
    )
    from pipeline.figures.plots import (
        sweep_plot as sweep_plot,
    )
    from pipeline.figures.style import (
        MINUS as MINUS,
        plain as plain,
        save as save,
        to_svg as to_svg,
    )

__getattr__, __dir__ = lazy_face(__file__)
