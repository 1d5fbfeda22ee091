"""Draws the figures of theory.md beside it: `python -m docs.figures`."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from vae.evidence import FactorAnalysis, importance_sampling, prior_monte_carlo
from vae.objectives import Objective, TrainingModule

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d1622b", "#2f8f5b", "#6b7280"


def linear_gaussian(D: int, d: int) -> FactorAnalysis:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(D, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    return FactorAnalysis(torch.zeros(D).double(), weight, 0.5 * torch.ones(D).double())


def encoder_gradients(module: TrainingModule, x: Tensor, eps: Tensor) -> Tensor:
    """The estimate for the posterior mean of each of the B copies of x, (B, d)."""
    outputs = []
    handle = module.model.encoder.register_forward_hook(lambda *args: outputs.append(args[-1]))
    surrogate = module(x, eps).surrogate
    handle.remove()
    (gradient,) = torch.autograd.grad(surrogate.sum(), outputs[0])
    return gradient[:, : module.model.noise_dim]


def gradient_variance(name: str, K: int, copies: int = 4000) -> float:
    """Total variance of one estimate for the encoder's mean; d = 8, an encoder off by one
    standard deviation and 1.2 times too wide."""
    fa = linear_gaussian(20, 8)
    g = torch.Generator().manual_seed(1)
    x, _ = fa.sample(1, generator=g)
    model = fa.as_vae(shift=1.0, widen=1.2)
    eps = torch.randn(K, copies, 8, generator=g, dtype=torch.float64)
    module = TrainingModule(model, Objective(name=name, num_samples=K))
    return encoder_gradients(module, x.expand(copies, -1), eps).var(0).sum().item()


def draw_gradient_variance(path: Path) -> None:
    K = (2, 4, 8, 16, 32)
    panels = {
        "Gradient of the ELBO": [
            ("score_function", ORANGE, "o"),
            ("elbo", BLUE, "s"),
            ("stl", GREEN, "^"),
        ],
        "Gradient of the IWAE bound": [("iwae", BLUE, "s"), ("dreg", GREEN, "^")],
    }
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.6), sharey=True, layout="constrained")
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        for name, colour, marker in names:
            variance = [gradient_variance(name, k) for k in K]
            print(name, [f"{v:.3g}" for v in variance])
            ax.plot(K, variance, "-", color=colour, marker=marker, ms=5)
            _label_last(ax, K[-1], variance[-1], name, colour)
        ax.set(xscale="log", yscale="log", xlabel="samples K", xlim=(1.8, 120))
        ax.set_xticks(K, [str(k) for k in K])
        ax.tick_params(which="minor", length=0)
        ax.set_title(title, loc="left", size=11)
        _plain(ax)
    axes[0].set_ylabel("variance of one estimate")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_effective_samples(path: Path, K: int = 4000, examples: int = 100) -> None:
    dims = np.array([1, 2, 3, 4, 6, 8, 10, 12])
    prior, encoder = [], []
    for d in dims.tolist():
        one = torch.ones(d, dtype=torch.float64)
        fa = FactorAnalysis(0 * one, torch.diag(one), 0.5 * one)
        g = torch.Generator().manual_seed(d)
        x, _ = fa.sample(examples, generator=g)
        model = fa.as_vae(shift=0.1, widen=1.2)
        prior.append(prior_monte_carlo(model, x, K, generator=g).ess.log().mean().exp().item())
        found = importance_sampling(model, x, K, generator=g)
        encoder.append(found.ess.log().mean().exp().item())
    print("prior", [f"{v:.4g}" for v in prior])
    print("encoder", [f"{v:.4g}" for v in encoder])
    figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    ax.axhline(K, color=GREY, lw=0.8, ls=":")
    ax.text(dims[0], K * 1.15, f"K = {K}", color=GREY, size=9)
    ax.plot(dims, encoder, "-s", color=BLUE, ms=5)
    ax.plot(dims, prior, "-o", color=ORANGE, ms=5)
    _label_last(ax, dims[-1], encoder[-1], "importance\nsampling", BLUE)
    _label_last(ax, dims[-1], prior[-1], "prior\nMonte Carlo", ORANGE)
    ax.set(yscale="log", ylim=(1, 2.5 * K), xlim=(0.5, 15), xlabel="latent dimension d")
    ax.set_xticks(dims)
    ax.set_title("Effective sample size (geometric mean of 100 examples)", loc="left", size=11)
    _plain(ax)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label_last(ax: Axes, x: float, y: float, text: str, colour: str) -> None:
    ax.annotate(text, (x, y), (8, 0), textcoords="offset points", va="center", color=colour, size=9)


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e5e7eb", lw=0.7)
    ax.set_axisbelow(True)


def main() -> None:
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    draw_gradient_variance(HERE / "gradient_variance.png")
    draw_effective_samples(HERE / "effective_samples.png")


if __name__ == "__main__":
    main()
