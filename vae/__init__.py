"""Variational autoencoders whose log-likelihoods can be trusted."""

from vae.checkpoint import load, save
from vae.factor_analysis import FactorAnalysis
from vae.model import VAE, VAEConfig

__all__ = ["VAE", "FactorAnalysis", "VAEConfig", "load", "save"]
