"""Estimates of log p(x), each with its error and its diagnostics."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from vae.evidence.annealing import (
        annealed_importance_sampling as annealed_importance_sampling,
        bidirectional as bidirectional,
    )
    from vae.evidence.estimators import (
        CHUNK_VALUES as CHUNK_VALUES,
        STOP_ESS as STOP_ESS,
        STOP_KHAT as STOP_KHAT,
        importance_sampling as importance_sampling,
        prior_monte_carlo as prior_monte_carlo,
    )
    from vae.evidence.factor_analysis import (
        FactorAnalysis as FactorAnalysis,
    )
    from vae.evidence.noise import (
        NOISE_BLOCK as NOISE_BLOCK,
        example_generators as example_generators,
        seeded_sample as seeded_sample,
        standard_normal as standard_normal,
    )
    from vae.evidence.pareto import (
        pareto_shape as pareto_shape,
        pareto_unit as pareto_unit,
    )
    from vae.evidence.proposals import (
        PROPOSALS as PROPOSALS,
        WIDEN as WIDEN,
        make_proposal as make_proposal,
    )
    from vae.evidence.settings import EvidenceSettings as EvidenceSettings
    from vae.evidence.weights import (
        Evidence as Evidence,
        WeightStream as WeightStream,
        draw_with_log_prob as draw_with_log_prob,
        ladder_rungs as ladder_rungs,
        pareto_khat as pareto_khat,
        tail_length as tail_length,
    )

__getattr__, __dir__ = lazy_face(__file__)
