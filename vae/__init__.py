"""Variational autoencoders whose log-likelihoods can be trusted."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae.checkpoint import load, save
    from vae.factor_analysis import FactorAnalysis
    from vae.model import VAE, VAEConfig

__all__ = ["VAE", "FactorAnalysis", "VAEConfig", "load", "save"]

_HOME = {
    "VAE": "vae.model",
    "VAEConfig": "vae.model",
    "FactorAnalysis": "vae.factor_analysis",
    "load": "vae.checkpoint",
    "save": "vae.checkpoint",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: torch takes two seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'vae' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
