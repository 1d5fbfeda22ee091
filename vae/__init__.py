"""Variational autoencoders whose log-likelihoods can be trusted."""

from typing import TYPE_CHECKING

from vae.system.lazy import lazy_face

if TYPE_CHECKING:
    from vae.evidence.factor_analysis import FactorAnalysis as FactorAnalysis
    from vae.models.saved_model import load as load, save as save
    from vae.models.vae import VAE as VAE, VAEConfig as VAEConfig

__getattr__, __dir__ = lazy_face(__file__)
