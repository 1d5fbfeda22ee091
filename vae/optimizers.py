"""Adam and Muon, their state kept by parameter name.

`torch.optim.Optimizer` imports torch's compiler when it is first used, 1.4 s in every worker and
trial; Adam's fused kernel needs none of it. `torch.optim.Muon` computes in bf16 whatever the
parameters are, which most CPUs do a hundred times slower than fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS, EPS = (0.9, 0.999), 1e-8
SLOTS = ("exp_avg", "exp_avg_sq", "step")
MOMENTUM, MOMENTUM_SLOT = 0.95, "momentum"
# Of the odd polynomial σ (a + b σ² + c σ⁴), which repeated takes singular values from (0, 1] to
# about 1, as chosen by Jordan; three times do here what five do.
QUINTIC, REPEATS = (3.4445, -4.7750, 2.0315), 3


class AdamW:
    """Adam with decoupled weight decay (Kingma and Ba, 2015; Loshchilov and Hutter, 2019).

    tensors: "<parameter>/<slot>" → the state, as a checkpoint holds it; those given are copied,
    those missing begin. A parameter without a gradient is left alone.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = BETAS,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.weight_decay, self.betas = weight_decay, betas
        self.tensors = {
            key: value.clone().to(self.parameters[key.rpartition("/")[0]].device)
            for key, value in (tensors or {}).items()
        }
        for name, parameter in self.parameters.items():
            for slot, value in self._first_state(name, parameter).items():
                self.tensors.setdefault(f"{name}/{slot}", value)

    def _first_state(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        moments = {slot: _zeros_like(parameter) for slot in ("exp_avg", "exp_avg_sq")}
        return moments | {"step": torch.zeros((), device=parameter.device)}

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor) -> None:
        """One update by the parameters' gradients; a rate on the device, (), is not read off it."""
        self._adam(self._with_gradient(), learning_rate)

    def _with_gradient(self) -> list[str]:
        return [name for name, parameter in self.parameters.items() if parameter.grad is not None]

    def _adam(self, names: Sequence[str], learning_rate: float | Tensor) -> None:
        exp_avgs, exp_avg_sqs, steps = (
            [self.tensors[f"{name}/{slot}"] for name in names] for slot in SLOTS
        )
        adamw(
            [self.parameters[name] for name in names],
            [grad for name in names if (grad := self.parameters[name].grad) is not None],
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=EPS,
            maximize=False,
        )


class Muon(AdamW):
    """Steps of equal size in all directions of a weight matrix (Jordan et al., Muon, 2024).

    A matrix (outputs, inputs), of a linear map or a convolution, moves against its momentum with
    all singular values set to about one, times learning_rate √(outputs / inputs): whatever the
    layer's width, its outputs change by about the learning rate (Bernstein and Newhouse, 2024,
    arXiv:2409.20325). All else is Adam's, at the same learning rate.
    """

    def _first_state(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        if is_weight_matrix(name, parameter):
            return {MOMENTUM_SLOT: _zeros_like(parameter)}
        return super()._first_state(name, parameter)

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor) -> None:
        names = self._with_gradient()
        matrices = [name for name in names if is_weight_matrix(name, self.parameters[name])]
        self._adam([name for name in names if name not in matrices], learning_rate)
        for name in matrices:
            parameter, gradient = self.parameters[name], self.parameters[name].grad
            assert gradient is not None
            momentum = self.tensors[f"{name}/{MOMENTUM_SLOT}"].lerp_(gradient, 1 - MOMENTUM)
            ahead = gradient.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
            outputs, inputs = ahead.shape
            step = orthogonalized(ahead).view_as(parameter)
            parameter.mul_(1 - learning_rate * self.weight_decay)
            parameter.sub_(step * (learning_rate * math.sqrt(outputs / inputs)))


OPTIMIZERS = {"adam": AdamW, "muon": Muon}


def _zeros_like(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)


def is_weight_matrix(name: str, parameter: Tensor) -> bool:
    """Whether it is a linear map's or a convolution's weight, (outputs, inputs, ...)."""
    return parameter.ndim > 1 and name.rpartition(".")[2] == "weight"


def orthogonalized(matrix: Tensor) -> Tensor:
    """U S Vᵀ → about U Vᵀ, by Newton and Schulz's iteration; zero stays zero.

    Nothing larger than (n, n), n the shorter side, is iterated: the polynomials are multiplied
    among themselves and put to the matrix once.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    tiny = torch.finfo(matrix.dtype).tiny
    wide = wide / wide.abs().amax().clamp_min(tiny)
    gram = wide @ wide.T
    squared_bound = gram.norm().clamp_min(tiny)  # ≥ the largest singular value squared
    gram /= squared_bound
    product = factor = _polynomial(gram)
    for _ in range(REPEATS - 1):
        gram = gram @ factor @ factor
        factor = _polynomial(gram)
        product = factor @ product
    result = product @ wide / squared_bound.sqrt()
    return result.T if tall else result


def _polynomial(gram: Tensor) -> Tensor:
    """a I + b G + c G²."""
    a, b, c = QUINTIC
    result = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal().add_(a)
    return result
