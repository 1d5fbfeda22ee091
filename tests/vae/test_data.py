"""Batches: every example once, and the same data and noise on any number of workers."""

import numpy as np
import pytest
import torch
from scipy import stats

from vae.data import BLOCK, NOISE_BLOCKS, Dataset, NoiseShape, draw_pixels

NOISE = NoiseShape(num_samples=3, noise_dim=5, dequantize=True, dtype=torch.float32)


def grey_dataset(count=150, binarize=False, shape=(2, 3)):
    levels = np.random.default_rng(0).integers(0, 256, size=(count + 40, *shape), dtype=np.uint8)
    images = torch.from_numpy(levels)
    return Dataset(train=images[:count], valid=images[count:], binarize=binarize)


def epoch(data, *, world_size=1, batch_size=70, epoch=1, seed=0):
    """One list a step of the ranks' batches."""
    ranks = [
        data.train_batches(
            NOISE,
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    return list(zip(*ranks, strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
@pytest.mark.parametrize("binarize", [False, True])
@pytest.mark.parametrize("noise_block", [BLOCK, 2 * BLOCK, 4096], ids="blocks of {}".format)
def test_workers_together_see_what_one_worker_sees(world_size, binarize, noise_block, monkeypatch):
    """Blocks larger than `BLOCK` are a GPU's: there a share may begin or end within one."""
    monkeypatch.setitem(NOISE_BLOCKS, "cpu", noise_block)
    data = grey_dataset(binarize=binarize)
    for (alone,), shares in zip(epoch(data), epoch(data, world_size=world_size), strict=True):
        assert torch.equal(torch.cat([share.x for share in shares]), alone.x)
        assert torch.equal(torch.cat([share.eps for share in shares], dim=1), alone.eps)
        assert torch.equal(torch.cat([share.u for share in shares]), alone.u)
        assert {share.global_size for share in shares} == {len(alone.x)}


def test_shares_are_whole_blocks_evenly_spread():
    data = grey_dataset(count=10 * BLOCK)
    ((first, second, third),) = epoch(data, world_size=3, batch_size=10 * BLOCK)
    assert [len(share.x) for share in (first, second, third)] == [3 * BLOCK, 3 * BLOCK, 4 * BLOCK]


def test_last_batch_smaller_than_a_block_leaves_other_workers_empty():
    data = grey_dataset(count=BLOCK + 5)
    (_, (rank0, rank1)) = epoch(data, world_size=2, batch_size=BLOCK)
    assert {len(rank0.x), len(rank1.x)} == {0, 5}
    assert rank0.global_size == rank1.global_size == 5


def test_every_example_once_an_epoch_in_a_new_order():
    data = Dataset(
        train=torch.arange(150, dtype=torch.float64).reshape(150, 1),
        valid=torch.zeros(1, 1, dtype=torch.float64),
    )
    orders = [
        torch.cat([batch.x for (batch,) in epoch(data, epoch=number)]).flatten().tolist()
        for number in (1, 2)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(150))
    assert orders[0] != orders[1]


def test_noise_differs_between_seeds_epochs_steps_and_blocks():
    data = grey_dataset(count=4 * BLOCK)
    draws = [
        batch.eps[0, start : start + BLOCK]
        for seed in (0, 1)
        for number in (1, 2)
        for (batch,) in epoch(data, batch_size=2 * BLOCK, epoch=number, seed=seed)
        for start in (0, BLOCK)
    ]
    distinct = {tuple(draw.flatten().tolist()) for draw in draws}
    assert len(distinct) == len(draws) == 16


def test_noise_is_standard_normal_and_uniform():
    data = grey_dataset(count=2048, shape=(4, 4))
    ((batch,),) = epoch(data, batch_size=2048)
    assert batch.u is not None
    count = batch.eps.numel()
    assert abs(batch.eps.mean().item()) < 4 / count**0.5
    assert abs(batch.eps.var().item() - 1) < 4 * (2 / count) ** 0.5
    assert batch.u.min() >= 0
    assert batch.u.max() < 1
    assert abs(batch.u.mean().item() - 0.5) < 4 * (1 / 12 / batch.u.numel()) ** 0.5


def test_pixels_are_drawn_with_their_grey_levels_probability():
    """Never at 0, always at 255, and between as a binomial says (Pearson's test)."""
    count, levels = 20_000, torch.arange(256, dtype=torch.uint8)
    words = torch.empty(count * 256 // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(3))
    drawn = draw_pixels(levels.expand(count, 256), words, out=torch.empty(count, 256))
    assert drawn[:, 0].max() == 0
    assert drawn[:, 255].min() == 1
    p = levels[1:255].double() / 255
    excess = drawn[:, 1:255].double().sum(0) - count * p
    statistic = (excess.square() / (count * p * (1 - p))).sum().item()
    assert 1e-4 < stats.chi2(254).cdf(statistic) < 1 - 1e-4


def test_pixels_of_an_odd_number_are_the_same_on_two_workers():
    """Blocks whose bits fill no whole words, and a last one that is short."""
    grey = torch.full((2 * BLOCK + 5, 7), 128, dtype=torch.uint8)
    data = Dataset(train=grey, valid=grey[:1], binarize=True)
    ((whole,),) = epoch(data, batch_size=len(grey))
    (shares,) = epoch(data, batch_size=len(grey), world_size=2)
    assert torch.equal(torch.cat([batch.x for batch in shares]), whole.x)
    assert 0.4 < whole.x.mean() < 0.6


def test_dynamic_binarisation_draws_each_visit_with_the_grey_levels_probability():
    levels = torch.tensor([0, 1, 64, 128, 254, 255], dtype=torch.uint8)
    data = Dataset(train=levels.expand(20_000, 6).contiguous(), valid=levels[None], binarize=True)
    ((batch,),) = epoch(data, batch_size=20_000)
    p = levels.double() / 255
    error = (batch.x.double().mean(0) - p).abs()
    assert torch.all(error <= 4 * (p * (1 - p) / 20_000).sqrt())
    assert set(batch.x.unique().tolist()) <= {0.0, 1.0}


def test_validation_noise_is_the_same_at_each_call():
    data = grey_dataset()
    first, second = (list(data.valid_batches(NOISE, seed=3)) for _ in range(2))
    assert all(torch.equal(a.eps, b.eps) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.cat([batch.x for batch in first]), data.valid)


@pytest.mark.parametrize("binarize", [False, True])
def test_statistics_are_numpys(binarize):
    data = grey_dataset(count=9000, binarize=binarize)
    mean, std = data.statistics()
    levels = data.train.numpy().astype(np.float64)
    expected = levels.mean(0) / 255 if binarize else levels.mean(0)
    expected_std = np.sqrt(expected * (1 - expected)) if binarize else levels.std(0)
    np.testing.assert_allclose(mean, expected, rtol=1e-12)
    np.testing.assert_allclose(std, expected_std, rtol=1e-9)


def test_splits_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"differ in shape: \(2,\) and \(3,\)"):
        Dataset(train=torch.zeros(4, 2), valid=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"data\.valid_fraction"):
        Dataset(train=torch.zeros(4, 2), valid=torch.zeros(0, 2))
