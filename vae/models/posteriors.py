"""Approximate posteriors q(z|x), each also drawn from given noise, and their KL to the prior.

Shapes: B batch, L latent values, * any leading (sample) dimensions. A family is a module from
the encoder's numbers (B, num_outputs) to a distribution of batch (B,), event (L,). Nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vae.models.kl import _CLOSED_FORMS, _register
from vae.models.latent_distributions import (
    CholeskyNormal,
    DiagonalNormal,
    Reparameterized,
)
from vae.models.networks import mlp
from vae.models.priors import bounded_log_scale


class FlowDistribution(Reparameterized):
    """A diagonal Gaussian pushed through an invertible map f(·; context).

    log q(z) = log base(f⁻¹(z)) - log |det ∂f|. Rezende and Mohamed (2015), eq. 5.
    """

    def __init__(self, base: DiagonalNormal, flow: Callable[..., Any], context: Tensor) -> None:
        super().__init__(base.batch_shape, base.event_shape[0], base.loc)
        self.base = base
        self.flow = flow
        self.context = context

    def from_noise(self, eps: Tensor) -> Tensor:
        return self.flow(self.base.from_noise(eps), self.context)[0]

    def from_noise_with_log_prob(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        start, log_base = self.base.from_noise_with_log_prob(eps)
        z, log_det = self.flow(start, self.context)
        return z, log_base - log_det

    def log_prob(self, value: Tensor) -> Tensor:
        start, log_det = self.flow(value, self.context, inverse=True)
        return self.base.log_prob(start) + log_det

    def detach(self) -> FlowDistribution:
        constant = self.with_constant_modules()
        return FlowDistribution(self.base.detach(), constant.flow, self.context.detach())

    def with_constant_modules(self) -> FlowDistribution:
        return FlowDistribution(self.base, _stopped(self.flow), self.context)

    def take(self, index: Tensor) -> FlowDistribution:
        return FlowDistribution(self.base.take(index), self.flow, self.context[index])


class HierarchicalPosterior(Reparameterized):
    """q(z|x) = q(z_1|x) Π q(z_{i+1} | z_i) over the concatenation (z_1, …, z_n).

    Burda, Grosse and Salakhutdinov (2016), eq. 2.
    """

    def __init__(
        self,
        first: Reparameterized,
        conditionals: Sequence[Callable[[Tensor], Reparameterized]],
        sizes: Sequence[int],
    ) -> None:
        super().__init__(first.batch_shape, sum(sizes), first._like)
        self.first = first
        self.conditionals = conditionals
        self.sizes = list(sizes)

    def from_noise(self, eps: Tensor) -> Tensor:
        return self.from_noise_with_log_prob(eps)[0]

    def from_noise_with_log_prob(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        noise = eps.split(self.sizes, -1)
        z, log_prob = self.first.from_noise_with_log_prob(noise[0])
        blocks = [z]
        for conditional, noise_i in zip(self.conditionals, noise[1:], strict=True):
            z, log_prob_i = conditional(z).from_noise_with_log_prob(noise_i)
            blocks.append(z)
            log_prob = log_prob + log_prob_i
        return torch.cat(blocks, -1), log_prob

    def log_prob(self, value: Tensor) -> Tensor:
        blocks = value.split(self.sizes, -1)
        log_prob = self.first.log_prob(blocks[0])
        for conditional, lower, upper in zip(
            self.conditionals, blocks[:-1], blocks[1:], strict=True
        ):
            log_prob = log_prob + conditional(lower).log_prob(upper)
        return log_prob

    def detach(self) -> HierarchicalPosterior:
        conditionals = [_stopped_conditional(conditional) for conditional in self.conditionals]
        return HierarchicalPosterior(self.first.detach(), conditionals, self.sizes)

    def take(self, index: Tensor) -> HierarchicalPosterior:
        return HierarchicalPosterior(self.first.take(index), self.conditionals, self.sizes)


def _stopped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same module with its weights as constants; gradients still reach its inputs."""
    if not isinstance(function, nn.Module):
        return function
    weights = {name: weight.detach() for name, weight in function.named_parameters()}
    return lambda *args, **kwargs: functional_call(function, weights, args, kwargs)


def _stopped_conditional(
    conditional: Callable[[Tensor], Reparameterized],
) -> Callable[[Tensor], Reparameterized]:
    stopped = _stopped(conditional)
    # a flow inside the distribution runs after the call that stopped the weights
    return lambda z: stopped(z).with_constant_modules()


class DiagonalPosterior(nn.Module):
    """q(z|x) = N(loc, diag(scale)²). The encoder's numbers: loc (L), raw log scale (L).

    The log scale is `bounded_log_scale` of its raw number, here and below.
    """

    def __init__(self, *, latent_dim: int, width: int) -> None:
        super().__init__()
        self.num_outputs = 2 * latent_dim

    def forward(self, outputs: Tensor) -> DiagonalNormal:
        loc, raw = outputs.chunk(2, -1)
        return DiagonalNormal(loc, bounded_log_scale(raw))


class FullPosterior(nn.Module):
    """q(z|x) = N(loc, S Sᵀ), S lower triangular.

    The encoder's numbers: loc (L), raw log of S's diagonal (L), S below its diagonal, row by row
    (L(L-1)/2, the order of torch.tril_indices(L, L, -1)).
    """

    def __init__(self, *, latent_dim: int, width: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.num_outputs = 2 * latent_dim + latent_dim * (latent_dim - 1) // 2
        rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
        self.register_buffer("flat_index", rows * latent_dim + columns, persistent=False)
        self.flat_index: Tensor

    def forward(self, outputs: Tensor) -> CholeskyNormal:
        size = self.latent_dim
        loc, raw, lower = outputs.split([size, size, self.num_outputs - 2 * size], -1)
        below = outputs.new_zeros(*outputs.shape[:-1], size * size)
        below = below.index_copy(-1, self.flat_index, lower)
        below = below.unflatten(-1, (size, size))
        return CholeskyNormal(loc, below + torch.diag_embed(bounded_log_scale(raw).exp()))


class FlowPosterior(nn.Module):
    """A coupling flow, conditioned on x, on top of the diagonal posterior.

    The encoder's numbers: loc (L), raw log scale (L), context (`width`).
    """

    def __init__(self, *, latent_dim: int, width: int, num_layers: int = 4) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.num_outputs = 2 * latent_dim + width
        self.flow = CouplingFlow(latent_dim, width, num_layers)

    def forward(self, outputs: Tensor) -> FlowDistribution:
        loc, raw, context = outputs.tensor_split([self.latent_dim, 2 * self.latent_dim], -1)
        base = DiagonalNormal(loc, bounded_log_scale(raw))
        return FlowDistribution(base, self.flow, context.tanh())


class CouplingFlow(nn.Module):
    """Affine coupling layers, the two halves of z taking turns; the identity at the start.

    Dinh, Sohl-Dickstein and Bengio (2017), eq. 7 and 8. With one latent value, one half is empty
    and each layer's shift and scale depend on the context only.
    """

    def __init__(self, size: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.sizes = [size - size // 2, size // 2]
        turns = [i % 2 if size > 1 else 0 for i in range(num_layers)]
        self.turns = turns
        self.layers = nn.ModuleList(
            Coupling(size - self.sizes[turn], self.sizes[turn], width) for turn in turns
        )

    def forward(self, z: Tensor, context: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """z (*, *batch, L), context (*batch, width) -> the image, and log |det ∂f| (*, *batch).

        `inverse` maps z to f⁻¹(z); the determinant is then the inverse map's.
        """
        batch = torch.broadcast_shapes(z.shape[:-1], context.shape[:-1])
        halves = list(z.expand(*batch, z.shape[-1]).split(self.sizes, -1))
        log_det = z.new_zeros(batch)
        order = range(len(self.turns))
        for i in reversed(order) if inverse else order:
            turn = self.turns[i]
            shift, log_scale = self.layers[i](halves[1 - turn], context)
            if inverse:
                halves[turn] = (halves[turn] - shift) * (-log_scale).exp()
                log_det = log_det - log_scale.sum(-1)
            else:
                halves[turn] = torch.addcmul(shift, halves[turn], log_scale.exp())
                log_det = log_det + log_scale.sum(-1)
        return torch.cat(halves, -1), log_det


class Coupling(nn.Module):
    """Shift and log-scale of one half of z, given the other half and the context."""

    def __init__(self, num_given: int, num_changed: int, width: int) -> None:
        super().__init__()
        self.from_context = mlp(width, (), width, "tanh")
        self.from_given = nn.Linear(num_given, width, bias=False) if num_given else None
        self.output = nn.Linear(width, 2 * num_changed)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, given: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.from_context(context)
        if self.from_given is not None:
            hidden = hidden + self.from_given(given)
        shift, log_scale = self.output(hidden.tanh()).to(given.dtype).chunk(2, -1)
        return shift, 2 * torch.tanh(0.5 * log_scale)


Family = DiagonalPosterior | FullPosterior | FlowPosterior


class ConditionalPosterior(nn.Module):
    """q(upper | lower): a posterior family whose parameters an MLP computes."""

    def __init__(self, lower: int, hidden: Sequence[int], activation: str, family: Family) -> None:
        super().__init__()
        self.network = mlp(lower, hidden, family.num_outputs, activation)
        self.family = family

    def forward(self, z: Tensor) -> Reparameterized:
        return self.family(self.network(z).to(z.dtype))


POSTERIORS: dict[str, type[Family]] = {
    "diagonal": DiagonalPosterior,
    "full": FullPosterior,
    "flow": FlowPosterior,
}


for (_q, _p), _formula in _CLOSED_FORMS.items():
    _register(_q, _p, _formula)
