"""Pictures of a trained model: reconstructions, samples, traversals and its latent space.

Images are drawn as images. Tables have no picture of themselves: their reconstructions are drawn
as observed against reconstructed values, their samples as histograms, their traversals as curves.

Shapes: N examples, D data values, L latent dimensions, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline import panels
from pipeline.figures import save
from vae import VAE
from vae.diagnostics import ACTIVE_VARIANCE, posterior_means

RECONSTRUCTED, SAMPLED, TRAVERSED, STEPS = 12, 64, 8, 11
TABLE_ROWS = 2000
AGGREGATED = 1000


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What the pictures show: a model and a split of data with its labels and column names.

    x: (N, *data_shape), in data units. labels: (N,) as text, or None. columns: names of a table's
    values, or None. seed: of the samples.
    """

    model: VAE
    x: Tensor
    labels: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    seed: int = 0

    @property
    def is_images(self) -> bool:
        return len(self.model.config.data_shape) in (2, 3)

    @property
    def names(self) -> list[str]:
        count = math.prod(self.model.config.data_shape)
        return list(self.columns) if self.columns else [f"x[{i}]" for i in range(count)]


def draw(gallery: Gallery, log_px: np.ndarray, out: Path) -> None:
    """Write reconstructions, samples, traversals, latent_space, activity, histogram (.png), and
    extremes for images.

    log_px: (N,), nats; it decides which images are the best and the worst.
    """
    means = posterior_means(gallery.model, gallery.x)
    with torch.inference_mode():
        draw_model = _draw_images if gallery.is_images else _draw_tables
        draw_model(gallery, means, log_px, out)
    activity = panels.activity_figure(means.var(0, correction=0).cpu().numpy(), ACTIVE_VARIANCE)
    save(activity, out / "activity.png")
    save(_latent_space(gallery, means.cpu().numpy(), log_px), out / "latent_space.png")


def to_images(x: Tensor, space: str, limits: tuple[float, float] | None = None) -> np.ndarray:
    """(N, H, W) grey or (N, H, W, 3) in [0, 1] from (N, [C,] H, W) in data units.

    limits: the values shown as black and white in `continuous`. Of 2 channels, or more than 3,
    only the first is shown.
    """
    images = x.float().cpu().numpy()
    low, high = limits or {"binary": (0.0, 1.0), "grey8": (0.0, 255.0)}.get(space, (0.0, 1.0))
    images = np.clip((images - low) / max(high - low, 1e-12), 0.0, 1.0)
    if images.ndim == 3:
        return images
    return np.moveaxis(images, 1, -1) if images.shape[1] == 3 else images[:, 0]


def traversal(
    gallery: Gallery, means: Tensor, start: int
) -> tuple[list[int], np.ndarray, list[Tensor]]:
    """Latents that move from one example along one dimension at a time.

    Args:
        gallery: the model and its data.
        means: posterior means of the split, (N, L).
        start: the example to move from.

    Returns:
        the dimensions whose posterior mean varies most over the split, most varying first; the
        steps (S,), in standard deviations of the aggregate posterior; for each dimension z (S, L).
    """
    size = gallery.model.config.latent_dims[0]  # p(x|z) reads the first stochastic layer only
    spread = means[:, :size].std(0, correction=0)
    dimensions = spread.argsort(descending=True)[:TRAVERSED].tolist()
    z_NL = _posterior_samples(gallery, means)
    centre, scale = z_NL.mean(0), z_NL.std(0, correction=0)
    steps = np.linspace(-3.0, 3.0, STEPS)
    moved = []
    for dimension in dimensions:
        z = means[start].repeat(STEPS, 1)
        values = torch.as_tensor(steps).to(z) * scale[dimension] + centre[dimension]
        z[:, dimension] = values
        moved.append(z)
    return dimensions, steps, moved


def _posterior_samples(gallery: Gallery, means: Tensor) -> Tensor:
    """z ~ q(z|x) for the first 1000 examples, (N, L)."""
    x = gallery.x[:AGGREGATED].to(means.device)
    generator = torch.Generator(means.device).manual_seed(gallery.seed)
    like = {"dtype": means.dtype, "device": means.device, "generator": generator}
    return gallery.model.posterior(x).from_noise(torch.randn(len(x), means.shape[1], **like))


def _prior_samples(gallery: Gallery, count: int) -> Tensor:
    """z ~ p(z), (count, L), by the gallery's seed whatever was drawn before."""
    device = next(gallery.model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(gallery.seed)
        return gallery.model.prior().sample(torch.Size((count,)))


def _seeded(gallery: Gallery, sample: Callable[[], Tensor]) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(gallery.seed)
        return sample()


def _draw_images(gallery: Gallery, means: Tensor, log_px: np.ndarray, out: Path) -> None:
    model, space = gallery.model, gallery.model.config.space
    limits = None
    if space == "continuous":
        low, high = np.quantile(gallery.x[:500].double().cpu().numpy(), [0.01, 0.99])
        limits = (float(low), float(high))

    def images(x: Tensor) -> np.ndarray:
        return to_images(x, space, limits)

    p_x = model.likelihood(means[:RECONSTRUCTED])
    rows = [
        ("test example", images(gallery.x[:RECONSTRUCTED])),
        ("mean of p(x|z)", images(p_x.mean)),
        ("draw from p(x|z)", images(_seeded(gallery, p_x.sample))),
    ]
    save(panels.image_rows(rows), out / "reconstructions.png")

    p_x = model.likelihood(_prior_samples(gallery, SAMPLED))
    grids = [
        ("mean of p(x|z), z ~ p(z)", images(p_x.mean)),
        ("draw of x from p(x|z)", images(_seeded(gallery, p_x.sample))),
    ]
    save(panels.image_panels(grids), out / "samples.png")

    start = int(np.argsort(log_px)[len(log_px) // 2])
    dimensions, _, moved = traversal(gallery, means, start)
    rows = [
        (f"z[{dimension}]", images(model.likelihood(z).mean))
        for dimension, z in zip(dimensions, moved, strict=True)
    ]
    save(panels.image_rows(rows), out / "traversals.png")

    shown = images(gallery.x)
    save(panels.histogram_with_extremes(log_px, shown), out / "histogram.png")
    save(panels.extremes_figure(log_px, shown), out / "extremes.png")


def _draw_tables(gallery: Gallery, means: Tensor, log_px: np.ndarray, out: Path) -> None:
    model, names = gallery.model, gallery.names
    x = gallery.x[:TABLE_ROWS].flatten(1).double().cpu().numpy()
    mean = model.likelihood(means[:TABLE_ROWS]).mean.flatten(1).double().cpu().numpy()
    save(panels.table_reconstructions(x, mean, names), out / "reconstructions.png")

    p_x = model.likelihood(_prior_samples(gallery, TABLE_ROWS))
    samples = _seeded(gallery, p_x.sample).flatten(1).double().cpu().numpy()
    save(panels.table_samples(x, samples, names), out / "samples.png")

    start = int(np.argsort(log_px)[len(log_px) // 2])
    dimensions, steps, moved = traversal(gallery, means, start)
    moved_means = np.stack(
        [model.likelihood(z).mean.flatten(1).double().cpu().numpy() for z in moved]
    )
    scale = x.std(0)
    standardised = (moved_means - x.mean(0)) / np.where(scale > 0, scale, 1.0)
    figure = panels.table_traversals(steps, standardised, dimensions, names)
    save(figure, out / "traversals.png")
    save(panels.histogram_with_extremes(log_px, None), out / "histogram.png")


def _latent_space(gallery: Gallery, means: np.ndarray, log_px: np.ndarray):
    """2-D as it is; 1-D against log p(x); more by its two principal components."""
    size = means.shape[1]
    if size == 1:
        points = np.stack([means[:, 0], log_px], 1)
        names = ("E[z|x]", "log p(x), nats")
    elif size == 2:
        points, names = means, ("E[z[0]|x]", "E[z[1]|x]")
    else:
        points, explained = principal_components(means)
        names = (
            f"first principal component of E[z|x] ({explained[0]:.0%} of the variance)",
            f"second ({explained[1]:.0%})",
        )
    return panels.latent_figure(points, gallery.labels, names)


def principal_components(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two leading principal components, (N, 2), and their shares of the variance, (2,)."""
    centred = means - means.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    total = max(float((singular**2).sum()), 1e-300)
    return left[:, :2] * singular[:2], singular[:2] ** 2 / total
