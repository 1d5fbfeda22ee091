"""Prepared arrays → batches: order, binarisation, dequantisation and ε, all keyed by the seed.

Noise is drawn in blocks of `BLOCK` examples. A block's generator is seeded by
(seed, purpose, epoch, step, block), so a worker draws only its own blocks and 1, 2 or 4 workers
at one global batch see the same data and the same noise, at no extra cost. On a GPU a launch costs
more than the numbers, so its blocks are larger, and a worker may use a part of what it draws.

Shapes: N examples, B a worker's share of a batch, K samples, d noise values.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

BLOCK = 32
NOISE_BLOCKS = {"cpu": BLOCK, "cuda": 4096}
VALID_BATCH = 512
SUMMED_VALUES = 2**21  # that `statistics_of` turns into float64 at a time
ORDER, TRAIN, VALID = 0, 1, 2  # what a seed is for


class Batch(NamedTuple):
    """One worker's share of a global batch, with its noise.

    x: (B, *data_shape), as the space says; eps: (K, B, d) standard normal; u: (B, *data_shape)
    uniform on [0, 1) for a likelihood that trains on dequantised data, else None; v: (B,) uniform
    on [0, 1) for an objective that draws `backward_samples`, else None; global_size: examples in
    the whole batch, over all workers.
    """

    x: Tensor
    eps: Tensor
    u: Tensor | None
    v: Tensor | None
    global_size: int


class NoiseShape(NamedTuple):
    """What a batch's noise must hold: K samples of d values, u or not, and v or not."""

    num_samples: int
    noise_dim: int
    dequantize: bool
    dtype: torch.dtype
    resample: bool = False


class Source(Protocol):
    """Where `fit` gets its batches: arrays in memory (`Dataset`), or a stream."""

    @property
    def num_train(self) -> int:
        """Training examples, over all workers."""
        ...

    def to(self, device: torch.device | str) -> Source:
        """The same source with its batches on `device`."""
        ...

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each training value, (*data_shape), in data units."""
        ...

    def train_batches(
        self,
        noise: NoiseShape,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """This worker's share of each global batch of one epoch, every example once.

        All workers get the same number of batches; a share may be empty.
        """
        ...

    def valid_batches(
        self, noise: NoiseShape, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """This worker's share of the validation split, every example once."""
        ...


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training and validation arrays, on the device where they are used; a `Source`.

    train, valid: (N, *data_shape), uint8 for `binary` and `grey8`, floating for `continuous`.
    binarize: `train` holds grey levels 0…255 and each visit draws x ~ Bernoulli(grey / 255)
    (dynamic binarisation, Salakhutdinov & Murray 2008); `valid` is binary already.
    """

    train: Tensor
    valid: Tensor
    binarize: bool = False

    def __post_init__(self) -> None:
        if self.train.shape[1:] != self.valid.shape[1:]:
            raise ValueError(
                f"training and validation examples differ in shape: {tuple(self.train.shape[1:])}"
                f" and {tuple(self.valid.shape[1:])}"
            )
        if not len(self.train) or not len(self.valid):
            raise ValueError(
                f"both splits need examples; training has {len(self.train)}, "
                f"validation {len(self.valid)} (data.valid_fraction)"
            )

    def to(self, device: torch.device | str) -> Dataset:
        return Dataset(
            train=self.train.to(device), valid=self.valid.to(device), binarize=self.binarize
        )

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each training value, (*data_shape), in data units.

        With `binarize` these are those of the binarised data: mean p = E[grey]/255 and
        variance p(1 - p).
        """
        return statistics_of([self.train], binarize=self.binarize)

    @property
    def num_train(self) -> int:
        return len(self.train)

    def train_batches(
        self,
        noise: NoiseShape,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """As `Source`, in an order from (seed, epoch); the last batch may be smaller."""
        generator = _generator(self.train.device, seed, ORDER, epoch)
        order = torch.randperm(len(self.train), generator=generator, device=self.train.device)
        for step, indices in enumerate(order.split(batch_size)):
            lo, hi = share(len(indices), rank, world_size)
            yield with_noise(
                self.train.index_select(0, indices[lo:hi]),
                noise,
                key=(seed, TRAIN, epoch, step),
                binarize=self.binarize,
                global_size=len(indices),
                first=lo,
                of=len(indices),
            )

    def valid_batches(
        self, noise: NoiseShape, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """As `Source`, with the same noise at each call."""
        yield from shares_of(self.valid.split(VALID_BATCH), noise, seed, rank, world_size)


def statistics_of(parts: Iterable[Tensor], *, binarize: bool) -> tuple[Tensor, Tensor]:
    """`Source.statistics` of examples that come in parts (N, *data_shape)."""
    count, origin, total, square = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for part in parts:
        for rows in part.split(max(1, SUMMED_VALUES // max(1, part.shape[1:].numel()))):
            if not count and part.is_floating_point():
                origin = rows[0].double()  # far from 0, squares alone would lose the spread
            count += len(rows)
            rows = rows.double() - origin.to(rows.device)
            total = rows.sum(0) + total.to(rows)
            square = rows.square().sum(0) + square.to(rows)
    mean = total / count
    if binarize:
        mean = mean / 255
        return mean, (mean * (1 - mean)).sqrt()
    variance = (square / count - mean.square()).clamp_min(0)
    return mean + origin.to(mean), variance.sqrt()


def shares_of(
    batches: Iterable[Tensor], noise: NoiseShape, seed: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """This worker's share of each batch of the validation split, (B, *data_shape), in their order.

    The same batches at the same seed get the same noise.
    """
    for step, x in enumerate(batches):
        lo, hi = share(len(x), rank, world_size)
        yield with_noise(
            x[lo:hi],
            noise,
            key=(seed, VALID, 0, step),
            binarize=False,
            global_size=len(x),
            first=lo,
            of=len(x),
        )


def share(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The examples [lo, hi) of a batch that are this worker's: whole blocks, evenly spread."""
    blocks = -(-size // BLOCK)
    lo, hi = rank * blocks // world_size, (rank + 1) * blocks // world_size
    return min(lo * BLOCK, size), min(hi * BLOCK, size)


def with_noise(
    x: Tensor,
    noise: NoiseShape,
    *,
    key: tuple[int, ...],
    binarize: bool,
    global_size: int,
    first: int = 0,
    of: int | None = None,
) -> Batch:
    """A batch of x (B, *data_shape) with its noise, each block's from (`key`, its number).

    binarize: x holds grey levels, from which binary pixels are drawn. first, of: x are the examples
    from `first` on of `of` that share a key; None: all.
    """
    size, device, values = len(x), x.device, x.shape[1:].numel()
    block = NOISE_BLOCKS.get(device.type, BLOCK)
    start = first // block * block
    count = min(-(-(first + size) // block) * block, size if of is None else of) - start
    eps = torch.empty(noise.num_samples, count, noise.noise_dim, dtype=noise.dtype, device=device)
    u = v = None
    if noise.dequantize:
        u = torch.empty(count, *x.shape[1:], dtype=noise.dtype, device=device)
    if noise.resample:
        v = torch.empty(count, dtype=noise.dtype, device=device)
    words = torch.empty(-(-count * values // 4), dtype=torch.int64, device=device)  # 16 bits each
    for offset in range(0, count, block):
        end = min(offset + block, count)
        generator = _generator(device, *key, (start + offset) // block)
        eps[:, offset:end] = torch.randn(
            (noise.num_samples, end - offset, noise.noise_dim),
            dtype=noise.dtype,
            device=device,
            generator=generator,
        )
        if u is not None:
            u[offset:end].uniform_(generator=generator)
        if binarize:
            part = words[offset * values // 4 : -(-end * values // 4)]
            part.random_(-(2**63), None, generator=generator)
        if v is not None:
            v[offset:end].uniform_(generator=generator)
    own = slice(first - start, first - start + size)
    if binarize:
        bits = words.view(torch.int16)[own.start * values :]
        x = draw_pixels(x, bits, out=torch.empty(x.shape, dtype=noise.dtype, device=device))
    if size < count:  # the others' part is not kept
        eps = eps[:, own].clone()
        u, v = (None if value is None else value[own].clone() for value in (u, v))
    return Batch(x, eps, u, v, global_size)


def draw_pixels(grey: Tensor, bits: Tensor, *, out: Tensor) -> Tensor:
    """Fill `out` with draws of 1 at probability grey / 255, else 0.

    bits: integers, whose random bits are taken 16 for each value; overwritten. The probability is
    exact at 0 and 255, and within 2^-16 between.
    """
    bits = bits.view(torch.int16)[: grey.numel()].view(grey.shape).clamp_(max=2**15 - 2)
    return torch.lt(bits, grey.to(torch.int16).mul_(257).sub_(2**15), out=out)


def _generator(device: torch.device, *key: int) -> torch.Generator:
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
