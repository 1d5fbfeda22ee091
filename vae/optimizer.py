"""AdamW by torch's fused kernel, its state kept by parameter name.

`torch.optim.Optimizer` imports torch's compiler when it is first used, 1.4 s in every worker and
trial; the kernel needs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS, EPS = (0.9, 0.999), 1e-8
SLOTS = ("exp_avg", "exp_avg_sq", "step")


class AdamW:
    """Adam with decoupled weight decay (Kingma and Ba, 2015; Loshchilov and Hutter, 2019).

    tensors: "<parameter>/<slot>" → the state, as a checkpoint holds it; those given are copied.
    A parameter without a gradient is left alone.
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

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update by the parameters' gradients."""
        names = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        for name in names:
            if f"{name}/step" not in self.tensors:
                self._start(name)
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

    def _start(self, name: str) -> None:
        parameter = self.parameters[name]
        for slot in ("exp_avg", "exp_avg_sq"):
            self.tensors[f"{name}/{slot}"] = torch.zeros_like(
                parameter, memory_format=torch.preserve_format
            )
        self.tensors[f"{name}/step"] = torch.zeros((), device=parameter.device)
