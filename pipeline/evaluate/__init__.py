"""The stage `evaluate`: log p(x) of the test split, baselines, pictures."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.evaluate.__main__ import evaluate as evaluate
    from pipeline.evaluate.baselines import (
        Baseline as Baseline,
        BernoulliMixture as BernoulliMixture,
        fit_baselines as fit_baselines,
        independent_bernoulli as independent_bernoulli,
    )
    from pipeline.evaluate.gallery import (
        to_images as to_images,
    )
    from pipeline.evaluate.scoring import (
        score_split as score_split,
    )
    from pipeline.evaluate.shifted_data import (
        NUM_EXAMPLES as NUM_EXAMPLES,
        auroc as auroc,
        compare as compare,
        shifted_sets as shifted_sets,
    )
    from pipeline.evaluate.summary import (
        reference as reference,
        summarise as summarise,
    )

__getattr__, __dir__ = lazy_face(__file__)
