"""Encoder and decoder networks: tensors in, tensors out.

Shapes: B batch, L latent values, P decoder outputs for each data value, D data values, C H W
channels, height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from vae.models.numerics import tanh_

NETWORKS = ("mlp", "conv")

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class Tanh(nn.Module):
    """tanh, by the faster `tanh_` on a CPU where no gradient is wanted.

    Under autocast what comes in bfloat16 then goes out in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return torch.tanh(x)
        if x.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu"):
            return tanh_(x.float())
        return tanh_(x.clone())


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": Tanh,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def mlp(num_inputs: int, hidden: Sequence[int], num_outputs: int, activation: str) -> nn.Sequential:
    """A multilayer perceptron, (*, num_inputs) -> (*, num_outputs), Glorot-initialised.

    Without hidden layers it is affine.
    """
    body = MLPBody(num_inputs, hidden, activation)
    return nn.Sequential(*body, _glorot(nn.Linear(body.num_features, num_outputs)))


class Encoder(nn.Module):
    """Standardised data -> the posterior's parameters, (B, *data_shape) -> (B, num_outputs).

    `body` computes features and the affine layer `output` reads them.
    """

    def __init__(
        self,
        *,
        data_shape: Sequence[int],
        num_outputs: int,
        network: str,
        hidden: Sequence[int],
        activation: str,
    ) -> None:
        super().__init__()
        check_network(network, data_shape, hidden)
        if network == "conv":
            body = ConvEncoderBody(data_shape, hidden, activation)
        else:
            body = MLPBody(math.prod(data_shape), hidden, activation)
        self.flatten = network == "mlp"
        self.body = body
        self.output = _glorot(nn.Linear(body.num_features, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.body(x.flatten(1) if self.flatten else x))


class Decoder(nn.Module):
    """Latent values -> the likelihood's parameters, (*batch, L) -> (*batch, P, *data_shape).

    `body` computes features; `output` (affine, or a convolution) has one bias for each number
    that it puts out, so that a decoder can start at the data's statistics.
    """

    def __init__(
        self,
        *,
        latent_dim: int,
        outputs_per_value: int,
        data_shape: Sequence[int],
        network: str,
        hidden: Sequence[int],
        activation: str,
    ) -> None:
        super().__init__()
        check_network(network, data_shape, hidden)
        self.output_shape = (outputs_per_value, *data_shape)
        if network == "conv":
            self.body = ConvDecoderBody(latent_dim, data_shape, hidden, activation)
            self.output = PixelwiseBiasedConv(hidden[0], outputs_per_value, data_shape)
        else:
            self.body = MLPBody(latent_dim, hidden, activation)
            self.output = _glorot(nn.Linear(self.body.num_features, math.prod(self.output_shape)))

    def forward(self, z: Tensor) -> Tensor:
        flat = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
        return self.output(self.body(flat)).reshape(*z.shape[:-1], *self.output_shape)

    @torch.no_grad()
    def set_output_bias(self, bias: Tensor) -> None:
        """Start at `bias`, (P, *data_shape)."""
        self.output.bias.copy_(bias.reshape(self.output.bias.shape))


def check_network(network: str, data_shape: Sequence[int], hidden: Sequence[int]) -> None:
    """Raise ValueError, for people, where `network` cannot model data of this shape."""
    if network not in NETWORKS:
        raise ValueError(f"model.network: {network!r} is unknown; known: {', '.join(NETWORKS)}")
    if network != "conv":
        return
    if len(data_shape) != 3:
        raise ValueError(
            "model.network: conv needs images, data_shape (channels, height, width), and the "
            f"data's shape is {tuple(data_shape)}; use model.network: mlp"
        )
    if not hidden:
        raise ValueError(
            "model.hidden: conv needs at least one number of channels, such as [32, 64], got []"
        )


class MLPBody(nn.Sequential):
    """Affine layers, each followed by the activation: (*, num_inputs) -> (*, num_features)."""

    def __init__(self, num_inputs: int, hidden: Sequence[int], activation: str) -> None:
        layers: list[nn.Module] = []
        widths = (num_inputs, *hidden)
        for before, after in pairwise(widths):
            layers += [_glorot(nn.Linear(before, after)), ACTIVATIONS[activation]()]
        super().__init__(*layers)
        self.num_features = widths[-1]


class ConvEncoderBody(nn.Sequential):
    """For each width: halve the image (odd sizes round up), then a residual block; flatten."""

    def __init__(self, data_shape: Sequence[int], hidden: Sequence[int], activation: str) -> None:
        layers: list[nn.Module] = []
        channels = data_shape[0]
        for width in hidden:
            layers += [
                _glorot(nn.Conv2d(channels, width, 3, stride=2, padding=1)),
                ResidualBlock(width, activation),
            ]
            channels = width
        super().__init__(*layers, ACTIVATIONS[activation](), nn.Flatten())
        self.num_features = channels * math.prod(_halved_sizes(data_shape, len(hidden))[-1])


class ConvDecoderBody(nn.Sequential):
    """The encoder's mirror image: (B, L) -> (B, hidden[0], H, W)."""

    def __init__(
        self, latent_dim: int, data_shape: Sequence[int], hidden: Sequence[int], activation: str
    ) -> None:
        sizes = _halved_sizes(data_shape, len(hidden))
        channels = hidden[-1]
        layers: list[nn.Module] = [
            _glorot(nn.Linear(latent_dim, channels * math.prod(sizes[-1]))),
            nn.Unflatten(1, (channels, *sizes[-1])),
        ]
        for width, size in zip((*hidden[-2::-1], hidden[0]), sizes[-2::-1], strict=True):
            layers += [
                ResidualBlock(channels, activation),
                Upsample(size),
                _glorot(nn.Conv2d(channels, width, 3, padding=1)),
            ]
            channels = width
        super().__init__(*layers, ACTIVATIONS[activation]())


class ResidualBlock(nn.Module):
    """x + f(x) with two 3x3 convolutions before each an activation; the identity at the start.

    There is no batch normalisation: an example's terms must not depend on its batch.
    """

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]
        self.change = nn.Sequential(
            ACTIVATIONS[activation](),
            _glorot(nn.Conv2d(width, width, 3, padding=1)),
            ACTIVATIONS[activation](),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


class Upsample(nn.Module):
    """Double height and width by repetition and crop to `size`, which may be odd."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.size
        return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")[..., :height, :width]


class PixelwiseBiasedConv(nn.Module):
    """A 3x3 convolution whose bias is learned for each pixel: (B, W, H, W) -> (B, P·C, H, W)."""

    def __init__(self, width: int, outputs_per_value: int, data_shape: Sequence[int]) -> None:
        super().__init__()
        channels, *size = data_shape
        self.weight = nn.Parameter(torch.empty(outputs_per_value * channels, width, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs_per_value * channels, *size))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, padding=1) + self.bias


def _halved_sizes(data_shape: Sequence[int], times: int) -> list[tuple[int, int]]:
    height, width = data_shape[1:]
    sizes = [(height, width)]
    for _ in range(times):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def _glorot(layer: Layer) -> Layer:
    """Glorot and Bengio (2010), eq. 16: uniform weights; biases start at zero."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
