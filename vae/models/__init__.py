"""What p(x|z), p(z) and q(z|x) are."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from vae.models.data_distributions import (
        LEVELS as LEVELS,
        BernoulliPixels as BernoulliPixels,
        bernoulli_log_prob as bernoulli_log_prob,
    )
    from vae.models.kl import (
        kl_divergence as kl_divergence,
        kl_per_dimension as kl_per_dimension,
    )
    from vae.models.latent_distributions import (
        CholeskyNormal as CholeskyNormal,
        DiagonalNormal as DiagonalNormal,
        HierarchicalPrior as HierarchicalPrior,
        LatentDistribution as LatentDistribution,
        Mixture as Mixture,
        Reparameterized as Reparameterized,
        StandardNormal as StandardNormal,
    )
    from vae.models.likelihoods import (
        LIKELIHOODS as LIKELIHOODS,
        SPACES as SPACES,
        Bernoulli as Bernoulli,
        Likelihood as Likelihood,
        check_likelihood as check_likelihood,
    )
    from vae.models.networks import (
        ACTIVATIONS as ACTIVATIONS,
        NETWORKS as NETWORKS,
        Decoder as Decoder,
        Encoder as Encoder,
        MLPBody as MLPBody,
        ResidualBlock as ResidualBlock,
        Tanh as Tanh,
        mlp as mlp,
    )
    from vae.models.numerics import (
        inverse_softplus as inverse_softplus,
        tanh_ as tanh_,
    )
    from vae.models.posteriors import (
        POSTERIORS as POSTERIORS,
        ConditionalPosterior as ConditionalPosterior,
        CouplingFlow as CouplingFlow,
        DiagonalPosterior as DiagonalPosterior,
        FlowDistribution as FlowDistribution,
        HierarchicalPosterior as HierarchicalPosterior,
    )
    from vae.models.priors import (
        LOG_SCALE_BOUND as LOG_SCALE_BOUND,
        PRIORS as PRIORS,
        ConditionalNormal as ConditionalNormal,
        NormalPrior as NormalPrior,
        bounded_log_scale as bounded_log_scale,
        raw_log_scale as raw_log_scale,
    )
    from vae.models.saved_model import (
        CONFIG as CONFIG,
        WEIGHTS as WEIGHTS,
        CheckpointError as CheckpointError,
        load as load,
        save as save,
    )
    from vae.models.vae import (
        PRECISIONS as PRECISIONS,
        VAE as VAE,
        ElboTerms as ElboTerms,
        VAEConfig as VAEConfig,
    )

__getattr__, __dir__ = lazy_face(__file__)
