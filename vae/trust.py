"""Where figures stop being trusted; without torch, for what only tells of them."""

KHAT_LIMIT = 0.7
"""Above this Pareto shape an estimate and its standard error are not to be trusted (Vehtari,
Simpson, Gelman, Yao and Gabry 2024, arXiv:1507.02646)."""
