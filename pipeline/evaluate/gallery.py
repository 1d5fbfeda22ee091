"""Pictures of a trained model: reconstructions, samples, traversals and its latent space.

Images are drawn as images. Tables have no picture of themselves: their reconstructions are drawn
as observed against reconstructed values, their samples as histograms, their traversals as curves.

Shapes: N examples, D data values, L latent dimensions, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.figures import panels, save
from pipeline.stage import spared
from vae.diagnostics import ACTIVE_VARIANCE, posterior_means
from vae.models import VAE

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

    def only(self, chosen: np.ndarray) -> Gallery:
        """The same of some examples. chosen: (N,) bool."""
        kept = None if self.labels is None else list(compress(self.labels, chosen.tolist()))
        return replace(self, x=self.x[torch.from_numpy(chosen)], labels=kept)

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

    log_px: (N,), nats; it decides which images are the best and the worst, and examples without a
    finite one are left out. A picture that fails costs a warning and itself.
    """
    known = np.isfinite(log_px)
    gallery, log_px = gallery.only(known), log_px[known]
    means = spared("evaluate", "pictures", lambda: posterior_means(gallery.model, gallery.x))
    if means is None:
        return
    pictures = _image_pictures if gallery.is_images else _table_pictures
    makers = pictures(gallery, means, log_px) | {
        "activity": lambda: panels.activity_figure(
            means.var(0, correction=0).cpu().numpy(), ACTIVE_VARIANCE
        ),
        "latent_space": lambda: _latent_space(gallery, means.cpu().numpy(), log_px),
    }
    for name, make in makers.items():
        spared("evaluate", f"{name}.png", partial(_write, make, out / f"{name}.png"))


def _write(make: Callable[[], Figure], path: Path) -> None:
    with torch.inference_mode():
        figure = make()
    try:
        save(figure, path)
    except Exception:
        path.unlink(missing_ok=True)
        raise


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


def _image_pictures(
    gallery: Gallery, means: Tensor, log_px: np.ndarray
) -> dict[str, Callable[[], Figure]]:
    model, space = gallery.model, gallery.model.config.space
    limits = None
    if space == "continuous":
        low, high = np.quantile(gallery.x[:500].double().cpu().numpy(), [0.01, 0.99])
        limits = (float(low), float(high))

    def images(x: Tensor) -> np.ndarray:
        return to_images(x, space, limits)

    def reconstructions() -> Figure:
        p_x = model.likelihood(means[:RECONSTRUCTED])
        return panels.image_rows(
            [
                ("test example", images(gallery.x[:RECONSTRUCTED])),
                ("mean of p(x|z)", images(p_x.mean)),
                ("draw from p(x|z)", images(_seeded(gallery, p_x.sample))),
            ]
        )

    def samples() -> Figure:
        p_x = model.likelihood(_prior_samples(gallery, SAMPLED))
        return panels.image_panels(
            [
                ("mean of p(x|z), z ~ p(z)", images(p_x.mean)),
                ("draw of x from p(x|z)", images(_seeded(gallery, p_x.sample))),
            ]
        )

    def traversals() -> Figure:
        start = int(np.argsort(log_px)[len(log_px) // 2])
        dimensions, _, moved = traversal(gallery, means, start)
        return panels.image_rows(
            [
                (f"z[{dimension}]", images(model.likelihood(z).mean))
                for dimension, z in zip(dimensions, moved, strict=True)
            ]
        )

    return {
        "reconstructions": reconstructions,
        "samples": samples,
        "traversals": traversals,
        "histogram": lambda: panels.histogram_with_extremes(log_px, images(gallery.x)),
        "extremes": lambda: panels.extremes_figure(log_px, images(gallery.x)),
    }


def _table_pictures(
    gallery: Gallery, means: Tensor, log_px: np.ndarray
) -> dict[str, Callable[[], Figure]]:
    model, names = gallery.model, gallery.names
    x = gallery.x[:TABLE_ROWS].flatten(1).double().cpu().numpy()

    def mean_at(z: Tensor) -> np.ndarray:
        return model.likelihood(z).mean.flatten(1).double().cpu().numpy()

    def samples() -> Figure:
        p_x = model.likelihood(_prior_samples(gallery, TABLE_ROWS))
        drawn = _seeded(gallery, p_x.sample).flatten(1).double().cpu().numpy()
        return panels.table_samples(x, drawn, names)

    def traversals() -> Figure:
        start = int(np.argsort(log_px)[len(log_px) // 2])
        dimensions, steps, moved = traversal(gallery, means, start)
        scale = x.std(0)
        standardised = (np.stack([mean_at(z) for z in moved]) - x.mean(0)) / np.where(
            scale > 0, scale, 1.0
        )
        return panels.table_traversals(steps, standardised, dimensions, names)

    return {
        "reconstructions": lambda: panels.table_reconstructions(
            x, mean_at(means[:TABLE_ROWS]), names
        ),
        "samples": samples,
        "traversals": traversals,
        "histogram": lambda: panels.histogram_with_extremes(log_px, None),
    }


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
