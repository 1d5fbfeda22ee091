"""A training step on a CUDA device as two CUDA graphs: two launches in place of hundreds.

A GPU computes a step of a small network in less time than Python takes to launch its operations. A
graph records them once and launches them together; it computes what they compute, up to the
learning rate's rounding to float32.

    gradient    forward pass, backward pass, norm        replayed, then read: is it finite?
    update      the optimiser                            replayed

What a step reads from Python, such as a counter of a likelihood's own, is read once. A graph keeps
the memory of one step to itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vae.data import Batch
from vae.fast import perceptron
from vae.models import VAE

WARM_UP = 3
"""Steps before the capture, in which libraries set themselves up."""

Gradient = Callable[[Batch, float | Tensor], tuple[Tensor, ...]]
Update = Callable[[float | Tensor], None]


class Replay:
    """A function's operations, captured once; its inputs, outputs and all between stay in place."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> None:
        self.inputs = [None if value is None else value.clone() for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # The outer context puts the stream back where the inner one fails. Other threads of the
        # process may use the device meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
        ):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor | float | None) -> tuple[Tensor, ...]:
        """The outputs, until the next call."""
        for own, value in zip(self.inputs, inputs, strict=True):
            if own is None or value is None:
                assert own is value
            elif isinstance(value, Tensor):
                own.copy_(value)
            else:
                own.fill_(value)
        self.graph.replay()
        return self.outputs


def may_be_graphed(model: VAE) -> bool:
    """Whether its steps run on the current CUDA device and, as far as is seen, never change."""
    device = next(model.parameters()).device
    return (
        device.type == "cuda"
        and device.index == torch.cuda.current_device()
        and perceptron.is_as_shipped(model)
        and not any(map(perceptron.is_hooked, model.modules()))
    )


class GraphedSteps:
    """Steps of batches of one size, of a function for the gradient and one for the update.

    `gradient` leaves each parameter's `.grad` for `update`, and may not read a value off the
    device, which is the current one. Where the capture fails, the steps are taken as before, with a
    warning; where parameters have moved in memory since, they are captured anew.
    """

    def __init__(
        self, gradient: Gradient, update: Update, parameters: Sequence[Tensor], batch_size: int
    ) -> None:
        self._gradient, self._update = gradient, update
        self.parameters, self.batch_size = parameters, batch_size
        self.places: list[int] = []
        self.aside: torch.cuda.Stream | None = None
        self.seen = 0
        self.failed = False
        self.replays: tuple[Replay, Replay] | None = None
        self.replaying = False

    def gradient(self, batch: Batch, beta: float) -> tuple[Tensor, ...]:
        """As the function given; its values hold until the next call."""
        self.replaying = False
        if self.failed or len(batch.x) != self.batch_size:
            return self._gradient(batch, beta)
        places = [parameter.data_ptr() for parameter in self.parameters]
        if places != self.places:
            self.places, self.replays, self.seen = places, None, 0
        if self.seen < WARM_UP:
            self.seen += 1
            return self._gradient_aside(batch, beta)
        if self.replays is None:
            try:
                self.replays = self._capture(batch, beta)
            except RuntimeError as error:
                self.failed = True
                torch.cuda.empty_cache()
                warnings.warn(f"training goes on without CUDA graphs: {error}", stacklevel=2)
                return self._gradient(batch, beta)
        self.replaying = True
        return self.replays[0](batch.x, batch.eps, batch.u, batch.v, beta)

    def update(self, learning_rate: float) -> None:
        """As the function given, by the gradients of the last call of `gradient`."""
        if self.replaying and self.replays is not None:
            self.replays[1](learning_rate)
        else:
            self._update(learning_rate)

    def _capture(self, batch: Batch, beta: float) -> tuple[Replay, Replay]:
        def gradient(
            x: Tensor, eps: Tensor, u: Tensor | None, v: Tensor | None, beta: Tensor
        ) -> tuple[Tensor, ...]:
            return self._gradient(Batch(x, eps, u, v, batch.global_size), beta)

        def update(learning_rate: Tensor) -> tuple[Tensor, ...]:
            self._update(learning_rate)
            return ()

        number = batch.eps.new_tensor(beta)
        first = Replay(gradient, batch.x, batch.eps, batch.u, batch.v, number)
        return first, Replay(update, torch.zeros((), device=batch.x.device))

    def _gradient_aside(self, batch: Batch, beta: float) -> tuple[Tensor, ...]:
        """On a stream of its own, as torch asks for what is captured later."""
        here = torch.cuda.current_stream()
        self.aside = self.aside or torch.cuda.Stream()
        self.aside.wait_stream(here)
        with torch.cuda.stream(self.aside):
            result = self._gradient(batch, beta)
        here.wait_stream(self.aside)
        return result
