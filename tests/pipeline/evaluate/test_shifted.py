"""Shifted data: what is done to it, and the area under the ROC curve by its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pipeline.evaluate import NUM_EXAMPLES, auroc, compare, shifted_sets


def test_auroc_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    normal, shifted = rng.integers(0, 9, 50).astype(float), rng.integers(-4, 6, 30).astype(float)
    truth = np.repeat([1, 0], [50, 30])
    expected = roc_auc_score(truth, np.concatenate([normal, shifted]))
    assert auroc(normal, shifted) == pytest.approx(expected, rel=1e-12)
    assert auroc(np.array([2.0]), np.array([1.0, 2.0, 3.0])) == 0.5


def test_pictures_are_inverted_replaced_by_noise_and_by_one_level() -> None:
    x = torch.randint(0, 256, (90, 1, 3, 3), dtype=torch.uint8)
    found = shifted_sets(x, "grey8", seed=0)
    kept = x[:NUM_EXAMPLES]
    assert torch.equal(found["inverted"], 255 - kept)
    assert torch.equal(found["one level"].amin((1, 2, 3)), found["one level"].amax((1, 2, 3)))
    assert (
        found["one level"].double().mean((1, 2, 3)) - kept.double().mean((1, 2, 3))
    ).abs().max() <= 0.5
    assert abs(found["uniform noise"].double().mean().item() - 127.5) < 4 * 74 / 24
    bits = shifted_sets(x % 2, "binary", seed=0)
    assert all(set(values.unique().tolist()) <= {0, 1} for values in bits.values())


def test_tables_keep_their_columns_values_but_not_what_goes_together() -> None:
    column = torch.randn(90, 1, dtype=torch.float64)
    x = torch.cat([column, 2 * column], 1)
    found = shifted_sets(x, "continuous", seed=0)
    shuffled, kept = found["columns shuffled"], x[:NUM_EXAMPLES]
    assert torch.equal(shuffled.sort(0).values, kept.sort(0).values)
    assert abs(np.corrcoef(shuffled.T)[0, 1]) < 0.5
    torch.testing.assert_close(found["three times as wide"].std(0), 3 * kept.std(0))
    torch.testing.assert_close(found["all at the mean"][5], kept.mean(0))


def test_the_comparison_tells_mean_and_area() -> None:
    x = torch.randn(100, 2, dtype=torch.float64)
    log_px = -x.square().sum(1).numpy()
    found = compare(x, log_px, "continuous", 0, lambda values: -values.square().sum(1).numpy())
    wide, mean = found["three times as wide"], found["all at the mean"]
    assert wide["auroc"] > 0.8
    assert mean["auroc"] < 0.1  # the likeliest of all, and nothing like the data
    assert mean["num_examples"] == NUM_EXAMPLES
