"""Proposals for importance sampling: the encoder's posterior, or one refined for each example.

Importance sampling is right with any proposal and precise with a good one. An encoder that was
trained on other examples is often not good enough (the amortisation gap; Cremer, Li and Duvenaud
2018, arXiv:1801.03558): its weights then have an infinite variance, which khat shows. Refinement
costs a few hundred gradients of the decoder for each example, once, whatever K.

    encoder   q(z|x)
    laplace   N(z*, H⁻¹), widened: z* maximises log p(x, z), H is the Hessian of -log p(x, z) there
    refined   the same, its mean and scales along H's axes then moved to the largest ELBO

Shapes: B examples, L latent values, S noise samples. Nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from vae.checks import check_name
from vae.models import VAE, CholeskyNormal, Reparameterized
from vae.optimizers import AdamW

MODE_STEPS = 40
NEWTON_STEPS = 3
VARIATIONAL_STEPS = 9
VARIATIONAL_SAMPLES = 16
DAMPING = 0.7
WIDEN = 1.1
"""Factor on the standard deviations: where the posterior is Gaussian, weights are then bounded."""

SMALLEST_PRECISION, LARGEST_PRECISION = 0.1, 10.0


def make_proposal(name: str, model: VAE, x: Tensor) -> Reparameterized:
    """The proposal of that name for x (B, *data_shape): batch (B,), event (L,), no gradient.

    Raises ValueError when there is no such name.
    """
    check_proposal(name)
    with torch.inference_mode(False):
        return PROPOSALS[name](model, x.clone() if x.is_inference() else x)


def check_proposal(name: str) -> None:
    """Raise ValueError unless `name` is one of `PROPOSALS`."""
    for fault in check_name("proposal", name, PROPOSALS):
        raise ValueError(fault)


def encoder_proposal(model: VAE, x: Tensor) -> Reparameterized:
    """q(z|x) as the encoder gives it."""
    with torch.no_grad():
        return model.posterior(x)


def laplace_proposal(model: VAE, x: Tensor) -> CholeskyNormal:
    """A Gaussian at the posterior's mode with its curvature (Laplace), widened."""
    mode, axes = _mode_and_axes(model, x)
    return CholeskyNormal(mode, WIDEN * _cholesky(axes))


def refined_proposal(model: VAE, x: Tensor) -> CholeskyNormal:
    """Laplace's Gaussian moved to the largest ELBO by mean and scales along its axes, widened.

    Each step solves, damped, what holds at the optimum (Opper and Archambeau 2009): with g the
    gradient of log p(x, z) along the axes, E[g] = 0 and scale⁻² = -E[∂g/∂z] = -E[ε g] / scale. The
    noise is a fixed scrambled Sobol set with its mirror image, the same for every example; of all
    steps the one with the largest ELBO is kept.
    """
    loc, axes = _mode_and_axes(model, x)
    eps = _fixed_noise(VARIATIONAL_SAMPLES, loc.shape[-1]).to(loc).unsqueeze(1)
    shift, log_scale = torch.zeros_like(loc), torch.zeros_like(loc)
    best = torch.full(loc.shape[:1], -math.inf).to(loc)
    best_shift, best_log_scale = shift, log_scale
    for _ in range(VARIATIONAL_STEPS):
        scale = log_scale.exp()
        log_joint, gradient = _value_and_gradient(model, x, loc + _apply(axes, shift + scale * eps))
        elbo = log_joint.mean(0) + log_scale.sum(-1)
        better = (elbo > best).unsqueeze(-1)
        best = best.maximum(elbo.nan_to_num(nan=-math.inf))
        best_shift = torch.where(better, shift, best_shift)
        best_log_scale = torch.where(better, log_scale, best_log_scale)
        along = _apply(axes.mT, gradient)
        precision = (-(eps * along).mean(0) / scale).clamp(SMALLEST_PRECISION, LARGEST_PRECISION)
        shift = shift + DAMPING * along.mean(0) / precision
        log_scale = log_scale - DAMPING * (0.5 * precision.log() + log_scale)
    loc = loc + _apply(axes, best_shift)
    return CholeskyNormal(loc, WIDEN * _cholesky(axes * best_log_scale.exp().unsqueeze(-2)))


PROPOSALS: dict[str, Callable[[VAE, Tensor], Reparameterized]] = {
    "encoder": encoder_proposal,
    "laplace": laplace_proposal,
    "refined": refined_proposal,
}


def _mode_and_axes(model: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior's mode (B, L), and axes A (B, L, L) with A Aᵀ = H⁻¹, eigenvectors as columns.

    Adam on log p(x, z) in units of the encoder's standard deviations, from the encoder's mean;
    the Hessian by central differences of the gradient, along each latent; then Newton's steps, as
    far as they lead upwards.
    """
    q = encoder_proposal(model, x)
    start, scale = q.mean, q.variance.sqrt()
    whitened = torch.zeros_like(start)
    optimizer = AdamW({"z": whitened}, betas=(0.9, 0.99))
    for step in range(MODE_STEPS):
        whitened.grad = -scale * _gradient(model, x, start + scale * whitened)
        optimizer.step(0.3 * (1 - step / MODE_STEPS))
    mode = start + scale * whitened
    axes = _inverse_root(_curvature(model, x, mode, 0.1 * scale))
    for _ in range(NEWTON_STEPS):
        log_joint, gradient = _value_and_gradient(model, x, mode)
        step = mode + _apply(axes, _apply(axes.mT, gradient))
        better = _value_and_gradient(model, x, step)[0] > log_joint
        mode = torch.where(better.unsqueeze(-1), step, mode)
    return mode, axes


def _curvature(model: VAE, x: Tensor, z: Tensor, step: Tensor) -> Tensor:
    """The Hessian of -log p(x, z) in z, (B, L, L), symmetric; step (B, L) of the differences."""
    columns = []
    for index in range(z.shape[-1]):
        move = torch.zeros_like(z)
        move[:, index] = step[:, index]
        difference = _gradient(model, x, z - move) - _gradient(model, x, z + move)
        columns.append(difference / (2 * step[:, index : index + 1]))
    hessian = torch.stack(columns, -1)
    return (hessian + hessian.mT) / 2


def _inverse_root(hessian: Tensor) -> Tensor:
    """A with A Aᵀ = H⁻¹; directions without curvature get that of a wide Gaussian.

    An example so far out that its curvature is no number gets 1: it must not end its neighbours'.
    """
    values, vectors = torch.linalg.eigh(_finite_or_one(hessian.double()))
    # An eigenvector's sign is the library's choice, and by it each axis would get other noise.
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * largest.sign()
    return (vectors / values.clamp_min(SMALLEST_PRECISION).sqrt().unsqueeze(-2)).to(hessian)


def _cholesky(axes: Tensor) -> Tensor:
    """The lower triangular S with S Sᵀ = A Aᵀ, its diagonal above 0.

    From Aᵀ = QR, S = Rᵀ but for signs. A Aᵀ itself would square the ratio of the axes: far out,
    where one latent is known to 1e-18 and another is free, it is no longer positive definite.
    """
    upper = torch.linalg.qr(_finite_or_one(axes.double()).mT).R
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    lower = (upper * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-1)).mT.to(axes)
    floor = torch.finfo(lower.dtype).tiny
    return lower.tril(-1) + torch.diag_embed(lower.diagonal(dim1=-2, dim2=-1).clamp_min(floor))


def _finite_or_one(matrices: Tensor) -> Tensor:
    """(B, L, L), the unit matrix in place of those that hold what is no number."""
    finite = matrices.isfinite().all(-1).all(-1)
    return torch.where(finite[:, None, None], matrices, torch.eye(matrices.shape[-1]).to(matrices))


def _apply(axes: Tensor, vectors: Tensor) -> Tensor:
    """A v for v (*, B, L)."""
    return torch.einsum("bij,...bj->...bi", axes, vectors)


def _gradient(model: VAE, x: Tensor, z: Tensor) -> Tensor:
    return _value_and_gradient(model, x, z)[1]


def _value_and_gradient(model: VAE, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x, z), (*, B), and its gradient in z, (*, B, L)."""
    z = z.detach().requires_grad_(True)
    with torch.enable_grad():
        log_joint = model.log_px_z(x, z) + model.prior().log_prob(z)
        return log_joint.detach(), torch.autograd.grad(log_joint.sum(), z)[0]


def _fixed_noise(count: int, dimension: int) -> Tensor:
    """(count, L) values with mean 0 and mean square 1 in each dimension, the same at each call."""
    uniform = SobolEngine(dimension, scramble=True, seed=0).draw(count // 2, dtype=torch.float64)
    half = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-6, 1 - 1e-6) - 1)
    noise = torch.cat([half, -half])
    return noise / noise.square().mean(0).sqrt()
