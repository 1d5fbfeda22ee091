"""log p(x|z) of few examples under many z, compiled.

Shapes: B examples, C samples, L latent values.
"""

from __future__ import annotations

from threading import local

import torch
from torch import Tensor

from vae.fast.perceptron import is_hooked, layers_of, supports_decoder
from vae.models import PRECISIONS, VAE

WORTH_COMPILING = 2**26
"""Decoder outputs of one call from which on it is compiled. Compiling takes two seconds once, and
then saves a quarter of a second for so many; what a call returns depends on that call alone."""


def compiled_decoder(
    model: VAE, x: Tensor, precision: str, num_samples: int
) -> CompiledDecoder | None:
    """The model's `CompiledDecoder`, where it can have one and it is worth it, or None.

    x: (B, *data_shape). precision: of the matrix products, a name in `vae.models.vae.PRECISIONS`.
    num_samples: how many z there will be for each example.
    """
    if not (
        len(x)
        and supports_decoder(model)
        and model.dtype == torch.float32
        and x.shape[1:] == model.config.data_shape
        and not any(map(is_hooked, model.modules()))
    ):
        return None
    if num_samples * x.numel() < WORTH_COMPILING or not ((x == 0) | (x == 1)).all():
        return None
    return CompiledDecoder(model, x, precision)


class CompiledDecoder:
    """log p(x|z) as a function of z, of a perceptron in float32 with Bernoulli pixels.

    z (C, B, L) -> (C, B), in nats, without a gradient. torch takes the matrix products, Numba what
    comes between and after them, in one pass each and on one core; threads may share it.
    """

    def __init__(self, model: VAE, x: Tensor, precision: str) -> None:
        from vae.fast.numba_kernels import kernels_for, signs_of  # most processes need no Numba

        self.dtype = PRECISIONS[precision] or torch.float32
        self.kernels = kernels_for(self.dtype, model.config.activation)
        self.signs = signs_of(x)
        self.num_inputs = model.config.latent_dims[0]
        layers = layers_of(model.decoder)
        self.weights = [layer.weight.detach().t().to(self.dtype) for layer in layers]
        self.biases = [layer.bias.contiguous().numpy(force=True) for layer in layers]
        self.own = local()  # each thread's; memory of this size taken anew each time grows holes

    @torch.inference_mode()
    def __call__(self, z: Tensor) -> Tensor:
        values = z[..., : self.num_inputs].flatten(0, -2).to(self.dtype)
        *hidden, logits = self._products_of(len(values))
        for weight, bias, products in zip(self.weights, self.biases, hidden, strict=False):
            values = self.kernels.activate_(torch.mm(values, weight, out=products), bias)
        torch.mm(values, self.weights[-1], out=logits)
        sums = self.kernels.bernoulli_log_prob(logits, self.biases[-1], self.signs)
        return sums.view(z.shape[:-1])

    def _products_of(self, rows: int) -> list[Tensor]:
        """Where this thread puts what each layer puts out, (rows, outputs)."""
        if getattr(self.own, "rows", 0) < rows:
            self.own.products = [
                torch.empty(rows, weight.shape[1], dtype=self.dtype) for weight in self.weights
            ]
            self.own.rows = rows
        return [products[:rows] for products in self.own.products]
