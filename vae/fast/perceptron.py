"""Perceptrons with Bernoulli pixels, their backward pass written out.

`VAE` and autograd come to the same numbers, to rounding, in operations that each have a node and a
buffer of their own: at a batch of 128 they cost a CPU as much as the matrix products, and with many
samples they are passes over more than a cache holds. Here the whole evidence lower bound goes
without autograd, and for other objectives, posteriors and priors the decoder with log p(x|z) is one
node of it. Training takes these ways where they apply; nothing else knows of them.

Shapes: B batch, K samples, L latent values, D data values. Nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vae.models import (
    LOG_SCALE_BOUND,
    VAE,
    Bernoulli,
    Decoder,
    DiagonalPosterior,
    Encoder,
    MLPBody,
    NormalPrior,
    bernoulli_log_prob,
    networks,
    tanh_,
)
from vae.system import samples_at_once


class Activation(NamedTuple):
    """An activation whose derivative follows from its output."""

    apply_: Callable[[Tensor], Tensor]  # in place
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient, output) -> gradient


ACTIVATIONS = {
    "tanh": Activation(tanh_, torch.ops.aten.tanh_backward),
    "relu": Activation(
        torch.relu_, lambda gradient, y: torch.ops.aten.threshold_backward(gradient, y, 0)
    ),
}

METHODS = {"posterior", "prior", "likelihood", "log_px_z"}  # that one model may have replaced
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
CACHED_VALUES = 2**22  # of log p(x|z)'s K B D values, that are taken at a time


class Layer(NamedTuple):
    weight: Tensor  # (outputs, inputs)
    bias: Tensor  # (outputs,)


def supports(model: VAE) -> bool:
    """Whether `elbo_and_gradient` may take this model apart: `supports_decoder`, and all else too.

    No two layers share a parameter, whose gradient would be the sum of theirs.
    """
    return (
        type(model.posterior_family) is DiagonalPosterior
        and type(model.prior_family) is NormalPrior
        and not model.upward
        and supports_decoder(model)
        and _is_plain(model.encoder, model.config.activation)
        and _are_distinct(layers_of(model.encoder) + layers_of(model.decoder))
    )


def supports_decoder(model: VAE) -> bool:
    """Whether `log_px_z` may take this model's decoder and likelihood apart.

    Those of a VAE in float32 or float64 on a CPU, of this package's own parts, with no hook on
    them and no autocast.
    """
    return (
        is_as_shipped(model)
        and type(model.likelihood_family) is Bernoulli
        and model.config.activation in ACTIVATIONS
        and _is_plain(model.decoder, model.config.activation)
        and model.dtype in (torch.float32, torch.float64)
        and model.data_loc.device.type == "cpu"
        and model.precision == "fp32"
        and not torch.is_autocast_enabled("cpu")
    )


def is_as_shipped(model: VAE) -> bool:
    """Whether it is a VAE, not a subclass, with the methods of one."""
    return type(model) is VAE and not METHODS & vars(model).keys()


def _is_plain(network: Encoder | Decoder, activation: str) -> bool:
    """Whether affine layers with this activation between them are all that the network does."""
    if type(network.body) is not MLPBody or type(network.output) is not nn.Linear:
        return False
    layers = list(network.body)
    pair = [nn.Linear, networks.ACTIVATIONS[activation]]
    return (
        [type(layer) for layer in layers] == pair * (len(layers) // 2)
        and all(layer.bias is not None for layer in (*layers[::2], network.output))
        and not any(map(is_hooked, network.modules()))
    )


def _are_distinct(layers: Sequence[Layer]) -> bool:
    parameters = _parameters(layers)
    return len(set(map(id, parameters))) == len(parameters)


def is_hooked(module: nn.Module) -> bool:
    """Whether something of the user's runs with the module's passes, or its own parameters'.

    torch keeps hooks under private names; where one is gone, there may be hooks.
    """
    return any(getattr(module, name, True) for name in MODULE_HOOKS) or any(
        getattr(parameter, name, True)
        for parameter in module.parameters(recurse=False)
        for name in PARAMETER_HOOKS
    )


@torch.no_grad()
def elbo_and_gradient(
    model: VAE, x: Tensor, eps: Tensor, *, beta: float, scale: float
) -> tuple[Tensor, Tensor]:
    """log p(x|z), (K, B), and the closed-form KL(q(z|x)‖p(z)), (B,).

    Leaves in the `.grad` of each parameter that requires one, or writes over the one that is there,
    the gradient of -scale Σ_B ((1/K) Σ_K log p(x|z) - beta KL).
    x: (B, *data_shape), 0 or 1; eps: (K, B, L), standard normal. Kingma and Welling (2014),
    appendix B and C. Raises ValueError for x of another shape.
    """
    model.check_data(x)
    encoder, decoder = layers_of(model.encoder), layers_of(model.decoder)
    activation = ACTIVATIONS[model.config.activation]
    x = x.to(model.dtype).flatten(1)

    *read, moments = _run(encoder, x - model.data_loc.flatten(), activation)
    loc, raw = moments.chunk(2, -1)
    bounded = torch.tanh(raw / LOG_SCALE_BOUND)
    log_std = bounded * LOG_SCALE_BOUND
    std = log_std.exp()
    variance_less_1 = std.square() - 1
    kl = (0.5 * (loc.square() + variance_less_1) - log_std).sum(-1)
    z = torch.addcmul(loc, std, eps)
    log_px_z, residual, written = _decode(decoder, x, z, activation)

    to_logits = residual.mul_(-scale / len(eps)).flatten(0, 1)
    to_decoder, to_first = _run_back(
        _weights(decoder), written, to_logits, activation, _gradients(decoder)
    )
    to_z = torch.mm(to_first, decoder[0].weight).view(eps.shape)
    to_loc = torch.add(to_z.sum(0), loc, alpha=scale * beta)
    to_log_std = (to_z * eps).sum(0).mul_(std).add_(variance_less_1, alpha=scale * beta)
    to_raw = torch.ops.aten.tanh_backward(to_log_std, bounded)
    to_moments = torch.cat([to_loc, to_raw], -1)
    to_encoder, _ = _run_back(_weights(encoder), read, to_moments, activation, _gradients(encoder))

    parameters = _parameters(encoder + decoder)
    for parameter, gradient in zip(parameters, to_encoder + to_decoder, strict=True):
        if parameter.requires_grad:
            parameter.grad = gradient
    return log_px_z, kl


def parameters_of(model: VAE) -> list[Tensor]:
    """Those that `elbo_and_gradient` writes a gradient for, where they require one."""
    return _parameters(layers_of(model.encoder) + layers_of(model.decoder))


def log_px_z(model: VAE, x: Tensor, z: Tensor) -> Tensor:
    """log p(x|z), (K, B), as `VAE.log_px_z` of z (K, B, L) and x (B, *data_shape), 0 or 1.

    Differentiable once, in z and in the decoder's parameters.
    """
    x = x.to(model.dtype).flatten(1)
    activation = ACTIVATIONS[model.config.activation]
    parameters = _parameters(layers_of(model.decoder))
    at_once = samples_at_once(x, {"cpu": CACHED_VALUES})
    parts = [
        _LogPxZ.apply(x, part, activation, *parameters)
        for part in z[..., : model.config.latent_dims[0]].split(at_once)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def layers_of(network: Encoder | Decoder) -> list[Layer]:
    """The affine layers of a network that `supports` or `supports_decoder` accepts, in order."""
    layers = [*list(network.body)[::2], network.output]
    return [Layer(layer.weight, layer.bias) for layer in layers]


def _parameters(layers: Sequence[Layer]) -> list[Tensor]:
    return [parameter for layer in layers for parameter in layer]


def _weights(layers: Sequence[Layer]) -> list[Tensor]:
    return [layer.weight for layer in layers]


def _gradients(layers: Sequence[Layer]) -> list[Tensor | None]:
    return [one.grad if one.requires_grad else None for one in _parameters(layers)]


class _LogPxZ(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, activation: Activation, *parameters: Tensor
    ) -> Tensor:
        layers = list(map(Layer, parameters[::2], parameters[1::2]))
        log_px_z, residual, inputs = _decode(layers, x, z, activation)
        ctx.activation, ctx.shape = activation, z.shape
        ctx.save_for_backward(residual, *parameters[::2], *inputs)
        return log_px_z

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        residual, *rest = ctx.saved_tensors
        weights, inputs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        # Overwrites the residual: nothing is larger, and nothing else reads it.
        to_logits = residual.mul_(gradients[0].unsqueeze(-1)).flatten(0, 1)
        to_parameters, to_first = _run_back(weights, inputs, to_logits, ctx.activation)
        to_z = None
        if ctx.needs_input_grad[1]:
            to_z = torch.mm(to_first, weights[0]).view(ctx.shape)
        return (None, to_z, None, *to_parameters)


def _decode(
    layers: Sequence[Layer], x: Tensor, z: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """log p(x|z), (K, B), its derivative in the logits, (K, B, D), and what each layer reads."""
    *inputs, logits = _run(layers, z.flatten(0, 1), activation)
    logits = logits.view(*z.shape[:-1], x.shape[-1])
    log_px_z = bernoulli_log_prob(logits, x, 1)
    residual = torch.sigmoid_(logits)
    return log_px_z, torch.sub(x, residual, out=residual), inputs


def _run(layers: Sequence[Layer], x: Tensor, activation: Activation) -> list[Tensor]:
    """What each layer reads, and what the last one puts out."""
    values = [x]
    for weight, bias in layers:
        if len(values) > 1:
            activation.apply_(values[-1])
        values.append(torch.addmm(bias, values[-1], weight.t()))
    return values


def _run_back(
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradient: Tensor,
    activation: Activation,
    into: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """From the gradient of what the last layer puts out to those of each layer's weight and bias,
    and to that of what the first layer puts out.

    into: where each of the former is written, if anywhere.
    """
    into = into or [None] * (2 * len(weights))
    found: list[Tensor] = []
    for place in reversed(range(len(weights))):
        weight, bias = into[2 * place : 2 * place + 2]
        to_weight = torch.mm(gradient.t(), inputs[place], out=weight)
        found = [to_weight, torch.sum(gradient, 0, out=bias), *found]
        if place:
            gradient = activation.backward(torch.mm(gradient, weights[place]), inputs[place])
    return found, gradient
