"""Noise for Monte-Carlo estimates: the same for a seed, whatever is computed beside it.

How torch fills a tensor with random numbers depends on its size, so an estimate's noise is drawn
in blocks of one size, and an example's noise may come from a generator of its own.

Shapes: B examples, C samples in a chunk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from vae.system import in_threads

NOISE_BLOCK = 64
"""Samples of each example whose noise is drawn at a time, whatever the chunk size."""

DRAWN_VALUES = 2**24
"""Values that are drawn at a time, but for one block, which may be more."""

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Where noise comes from: one source, one for each example (no two the same), or torch's own."""


def noise_blocks(
    draw: Callable[[int], Tensor], num_samples: int, chunk_size: int
) -> Iterator[Tensor]:
    """Yield num_samples draws in chunks of at most chunk_size, the same draws for any chunk size.

    `draw` is asked for whole blocks of NOISE_BLOCK samples, which are cut and joined into chunks;
    of several blocks it must give what as many draws of one would.
    """
    pending = draw(NOISE_BLOCK)
    while num_samples > 0:
        wanted = min(chunk_size, num_samples)
        missing = wanted - pending.shape[0]
        if missing <= 0:
            chunk, pending = pending[:wanted], pending[wanted:]
        else:
            drawn = draw(math.ceil(missing / NOISE_BLOCK) * NOISE_BLOCK)
            chunk, pending = torch.cat([pending, drawn[:missing]]), drawn[missing:]
        yield chunk
        num_samples -= wanted


def block_by_block(draw: Callable[[int], Tensor], count: int, at_once: int = 1) -> Tensor:
    """`count` samples, a multiple of NOISE_BLOCK, from `draw` of `at_once` blocks or fewer."""
    most = at_once * NOISE_BLOCK
    parts = [draw(min(most, count - start)) for start in range(0, count, most)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def normal_blocks(shape: tuple[int, ...], *, like: Tensor, generator: Generators) -> Tensor:
    """`standard_normal` for `noise_blocks`; shape[0] is a multiple of NOISE_BLOCK."""
    at_once = 1
    if _are_on_cpu(generator if isinstance(generator, Sequence) else [generator or like]):
        # torch makes normal numbers 16 at a time there, so one draw is what several would be
        at_once = max(1, DRAWN_VALUES // max(1, NOISE_BLOCK * math.prod(shape[1:])))

    def draw(count: int) -> Tensor:
        return standard_normal((count, *shape[1:]), like=like, generator=generator)

    return block_by_block(draw, shape[0], at_once)


def standard_normal(shape: tuple[int, ...], *, like: Tensor, generator: Generators) -> Tensor:
    """Noise with `like`'s dtype and device, drawn on the generator's own device.

    With a generator for each example, shape is (C, B, *rest) and an example's noise does not
    depend on those beside it.
    """
    if isinstance(generator, Sequence):
        alone = (shape[0], *shape[2:])
        if _are_on_cpu(generator):
            return _side_by_side(alone, like, generator)
        drawn = [
            torch.randn(alone, dtype=like.dtype, device=own.device, generator=own)
            for own in generator
        ]
        return torch.stack(drawn, dim=1).to(like.device)
    device = like.device if generator is None else generator.device
    return torch.randn(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def _side_by_side(
    shape: tuple[int, ...], like: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """(C, B, *rest), each example's noise, of this shape, from its generator; several at a time.

    A generator fills a tensor on one core only, and a GPU would wait for it longest of all.
    """
    places = len(generators), *shape
    drawn = torch.empty(places, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)

    @torch.inference_mode()
    def draw(part: range) -> None:
        for place in part:
            drawn[place].normal_(generator=generators[place])

    share = max(1, math.ceil(len(generators) / torch.get_num_threads()))
    starts = range(0, len(generators), share)
    parts = (range(start, min(start + share, len(generators))) for start in starts)
    for _ in in_threads(draw, parts, with_caller=False):
        pass
    return drawn.to(like.device, non_blocking=like.is_cuda).transpose(0, 1).contiguous()


def _are_on_cpu(sources: Sequence[torch.Generator | Tensor]) -> bool:
    return all(source.device.type == "cpu" for source in sources)


def example_generators(x: Tensor, seed: int) -> list[torch.Generator]:
    """A source of noise for each example of x (B, *data_shape), from its values and the seed.

    An example scored with its own gets the same estimate, but for rounding, wherever and beside
    whatever it is scored. On the CPU.
    """
    rows = x.detach().cpu().double().flatten(1).contiguous().numpy()
    key = seed.to_bytes(8, "little")
    digests = (hashlib.blake2b(row.data, digest_size=8, key=key).digest() for row in rows)
    return [torch.Generator().manual_seed(int.from_bytes(d, "little") >> 1) for d in digests]


def seeded_sample(
    distribution: Distribution,
    shape: tuple[int, ...],
    *,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """A draw from any distribution that depends on the generator only.

    torch's distributions take no generator, so the default one is seeded from it for the draw and
    then put back.
    """
    if generator is None:
        return distribution.sample(shape)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return distribution.sample(shape)
