"""Passes over hidden units and pixels that torch takes several of, compiled by Numba.

For one core each, and without Python's lock, so that threads run them side by side. A decoder's
values come as the bits of float32 or of bfloat16, which numpy doesn't know.

Shapes: R rows, B examples, D data values, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from numpy import float32, int32, uint32
from torch import Tensor

Bits = np.ndarray[Any, Any]

LOG2_E = float32(math.log2(math.e))
SIGN = uint32(1 << 31)
SMALLEST, LARGEST = float32(-125), float32(31)
"""Powers of 2: 1 + 2^t is 1 in float32 below, and 2^t above; four of the largest have a product."""

MOST_COLUMNS = 1000
"""So many, four multiplied and scaled to √½ … √2 at a time, have a product in float32."""

ROOT_HALF = float32(math.sqrt(0.5)).view(int32)
SHIFTED = float32(1.5 * 2**23)
"""The lowest bits of t + SHIFTED are t, rounded."""

EXP2 = tuple(
    float32(coefficient)
    for coefficient in (
        1.0000000716552195,
        0.6931469670632642,
        0.24022119721166574,
        0.05550713274650634,
        0.00967554147984634,
        0.0013276472028500084,
    )
)
"""The polynomial nearest to 2^f for f in -½ … ½: its largest relative error is 7.5e-8."""


_compiled: Any = partial(numba.njit, nogil=True, error_model="numpy")


# LLVM makes vectors of these loops as they are: min and max instead of comparisons, shifts by
# constants, sums and products in any order. NaN, as arithmetic makes it, stays NaN: `_exp2` and
# `excess` see to it. Nothing checks bounds.


@_compiled(fastmath={"contract"})
def _exp2(t: Any) -> Any:
    """2^t, SMALLEST ≤ t ≤ LARGEST: the fraction by a polynomial, the rest in the exponent."""
    shifted = float32(t + SHIFTED)
    f = t - float32(shifted - SHIFTED)
    power = EXP2[5]
    power = power * f + EXP2[4]
    power = power * f + EXP2[3]
    power = power * f + EXP2[2]
    power = power * f + EXP2[1]
    power = float32(power * f + EXP2[0])
    return uint32(power.view(uint32) + uint32(shifted.view(uint32) << uint32(23))).view(float32)


@_compiled(fastmath={"contract"})
def _one_plus_exp2(t: Any) -> Any:
    """1 + 2^t as a factor, and the excess: a power of 2 that is left out of it."""
    factor = float32(1) + _exp2(max(min(t, LARGEST), SMALLEST))
    return factor, (float32(0) if t <= LARGEST else t - LARGEST)


class Kernels:
    """Compiled for one dtype, float32 or bfloat16, and one activation, tanh or relu.

    Tensors are contiguous and on the CPU. Compiling takes a second or two.
    """

    def __init__(self, dtype: torch.dtype, activation: str) -> None:
        self.bits = {torch.float32: torch.uint32, torch.bfloat16: torch.uint16}[dtype]
        name = str(self.bits).removeprefix("torch.")
        self._activate = _activation_loop(name, activation)
        self._subtract_softplus = _softplus_loop(name)

    def activate_(self, products: Tensor, bias: Bits) -> Tensor:
        """The activation of products + bias, in place of the products.

        products: (R, H), of this dtype; bias: (H,), float32. The absolute error of tanh is 2e-7,
        or bfloat16's.
        """
        self._activate(products.view(self.bits).numpy(), bias)
        return products

    def bernoulli_log_prob(self, products: Tensor, bias: Bits, signs: Bits) -> Tensor:
        """Σ_D log p(x) of Bernoulli pixels with logits products + bias: (R,), float32, in nats.

        Row r is of example r mod B. products: (R, D), of this dtype; bias: (D,), float32; signs:
        `signs_of` x, (B, D). The error is 2e-7 of the sum, and 6e-8 a pixel.
        """
        bits = products.view(self.bits).numpy()
        sums = np.zeros(len(bits), float32)
        for start in range(0, len(bias), MOST_COLUMNS):
            part = bias[start : start + MOST_COLUMNS]
            self._subtract_softplus(bits, part, signs, start, sums)
        return torch.from_numpy(sums)


kernels_for = cache(Kernels)


def signs_of(x: Tensor) -> Bits:
    """What gives the logit of a pixel that is 1 another sign. x: (B, *data_shape), 0 or 1."""
    is_one = x.flatten(1).numpy(force=True) > 0.5
    return np.ascontiguousarray(np.where(is_one, SIGN, uint32(0)))


SHIFTS = {"uint16": uint32(16), "uint32": uint32(0)}
"""How far a dtype's bits are from float32's."""


def _activation_loop(bits_name: str, activation: str) -> Callable[..., None]:
    shift, half = SHIFTS[bits_name], uint32((1 << SHIFTS[bits_name]) >> 1)

    @_compiled(fastmath={"contract"})
    def tanh(value: Any) -> Any:
        t = float32(2 * LOG2_E) * value
        return float32(1) - float32(2) / (float32(1) + _exp2(max(min(t, LARGEST), -LARGEST)))

    @_compiled()
    def relu(value: Any) -> Any:
        return float32(0) if value < 0 else value

    function = {"tanh": tanh, "relu": relu}[activation]

    @_compiled(f"({bits_name}[:, ::1], float32[::1])")
    def activate(products: Any, bias: Any) -> None:
        for r in range(len(products)):
            row = products[r]
            for h in range(len(bias)):
                value = uint32(uint32(row[h]) << shift).view(float32) + bias[h]
                row[h] = uint32(float32(function(value)).view(uint32) + half) >> shift

    return activate


def _softplus_loop(bits_name: str) -> Callable[..., None]:
    shift = SHIFTS[bits_name]

    @_compiled(fastmath={"contract"})
    def exponent_of(bits: Any, bias: Any, sign: Any) -> Any:
        """t with 2^t = e^logit, or e^-logit."""
        logit = float32(uint32(uint32(bits) << shift).view(float32) + bias)
        return uint32(logit.view(uint32) ^ sign).view(float32) * LOG2_E

    @_compiled(
        f"({bits_name}[:, ::1], float32[::1], uint32[:, ::1], int64, float32[::1])",
        fastmath={"contract", "reassoc"},
    )
    def subtract_softplus(products: Any, bias: Any, signs: Any, start: Any, sums: Any) -> None:
        """Take Σ log(1 + 2^t) over the columns from `start` on that have a bias from each sum.

        It is the logarithm of a product, whose exponent and mantissa are kept apart.
        """
        columns = len(bias)
        fourth = columns // 4
        for r in range(len(products)):
            row = products[r, start : start + columns]
            sign = signs[r % len(signs), start : start + columns]
            exponent, mantissa, excess = int32(0), float32(1), float32(0)
            for j in range(fourth):
                k, m, n = j + fourth, j + 2 * fourth, j + 3 * fourth
                a, beyond_a = _one_plus_exp2(exponent_of(row[j], bias[j], sign[j]))
                b, beyond_b = _one_plus_exp2(exponent_of(row[k], bias[k], sign[k]))
                c, beyond_c = _one_plus_exp2(exponent_of(row[m], bias[m], sign[m]))
                d, beyond_d = _one_plus_exp2(exponent_of(row[n], bias[n], sign[n]))
                excess += (beyond_a + beyond_b) + (beyond_c + beyond_d)
                product = float32((a * b) * (c * d)).view(int32)
                power = int32(int32(product - ROOT_HALF) >> int32(23))
                exponent = int32(exponent + power)
                mantissa *= int32(product - int32(power << int32(23))).view(float32)
            total = exponent + excess + math.log2(np.float64(mantissa))
            for j in range(4 * fourth, columns):
                a, beyond_a = _one_plus_exp2(exponent_of(row[j], bias[j], sign[j]))
                total += beyond_a + math.log2(np.float64(a))
            sums[r] -= math.log(2) * total

    return subtract_softplus
