"""log p(x|z) of few examples under many z: what doesn't depend on z is computed once.

With Bernoulli pixels and the logits l of their likelier value, log p(x|z) = Σ log σ(l) - u·l, where
u is 1 for pixels of the other value. A perceptron's last layer is affine, l = W h + b, so that
u·l = (uᵀW) h + uᵀb is a product with its H hidden units, not with all logits. Hidden units of a
tanh are kept as σ: of tanh(a) = 2σ(2a) - 1 the weights take the rest.

Shapes: B examples, C samples, D data values, L latent values, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vae.model import PRECISIONS, VAE
from vae.perceptron import ACTIVATIONS, is_hooked, knows_decoder, layers_of

LogPxZ = Callable[[Tensor], Tensor]
"""z (C, B, L) -> log p(x|z), (C, B), in nats, without a gradient."""

GROUP = 8
"""Values of σ that are multiplied before one logarithm."""


def log_px_z_of(model: VAE, x: Tensor, precision: str = "fp32") -> LogPxZ:
    """log p(x|z) as a function of z: by `Folded`, or by the model.

    x: (B, *data_shape), 0 or 1 for Bernoulli pixels. precision: of the decoder's matrix products, a
    name in `vae.model.PRECISIONS`; call the function within `VAE.products_in` of the same.
    """
    if len(x) and knows_decoder(model) and not any(map(is_hooked, model.modules())):
        return Folded(model, x, precision)
    return lambda z: model.likelihood(z).log_prob(x)


class Folded:
    """`log_px_z_of` a perceptron with Bernoulli pixels. Threads may share it."""

    @torch.no_grad()
    def __init__(self, model: VAE, x: Tensor, precision: str) -> None:
        self.model, self.x = model, x
        # As autocast, which leaves float64 alone.
        rounded = PRECISIONS[precision] if model.dtype == torch.float32 else None
        self.dtype = rounded or model.dtype
        layers = layers_of(model.decoder)
        saturates = model.config.activation == "tanh"
        usual = ACTIVATIONS[model.config.activation].apply_
        self.activation_: Callable[[Tensor], Tensor] = torch.sigmoid_ if saturates else usual
        self.layers: list[tuple[Tensor, Tensor]] = []
        likelier = (model.data_loc > 0.5).to(model.dtype).flatten()  # than not, over all data
        for place, (weight, bias) in enumerate(layers):
            weight = weight.to(self.dtype).to(model.dtype)  # so that all uses are of the same
            if place and saturates:
                weight, bias = 2 * weight, bias - weight.sum(1)
            if place + 1 == len(layers):
                sign = 2 * likelier - 1
                weight, bias = sign.unsqueeze(1) * weight, sign * bias
            elif saturates:
                weight, bias = 2 * weight, 2 * bias
            self.layers.append((weight.to(self.dtype), bias.to(self.dtype)))
        unlikelier = (x.to(model.dtype).flatten(1) - likelier).abs()
        weight, bias = (part.to(model.dtype) for part in self.layers[-1])
        self.to_linear, self.constant = -unlikelier @ weight, -unlikelier @ bias  # (B, H), (B,)

    def __call__(self, z: Tensor) -> Tensor:
        samples = z.shape[:-1]
        values = z[..., : self.model.config.latent_dims[0]].flatten(0, -2).to(self.dtype)
        for weight, bias in self.layers[:-1]:
            values = self.activation_(nn.functional.linear(values, weight, bias))
        logits = nn.functional.linear(values, *self.layers[-1]).to(self.model.dtype)
        groups = _products(torch.sigmoid_(logits))
        if groups.amin() < torch.finfo(groups.dtype).tiny:
            # So many pixels almost surely of their unlikelier value that a product has lost its
            # digits: these samples once more.
            return self.model.likelihood(z).log_prob(self.x)
        hidden = values.view(*samples, -1).to(self.model.dtype)
        linear = torch.linalg.vecdot(hidden, self.to_linear)
        return groups.log_().sum(-1).view(samples).add_(linear).add_(self.constant)


def _products(factors: Tensor) -> Tensor:
    """Products of `GROUP` columns each, and of what is left. factors: (R, D)."""
    count = factors.shape[-1] // GROUP
    whole = factors[:, : count * GROUP]
    products = whole.unflatten(-1, (GROUP, count)).prod(-2)
    rest = factors[:, count * GROUP :]
    return torch.cat([products, rest], -1) if rest.shape[-1] else products
