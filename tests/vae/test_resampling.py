"""Few samples in place of all: the same mean, exactly."""

import pytest
import torch
from torch import Tensor

from tests.vae.test_objectives import (
    MODELS,
    binary,
    encoder_gradients,
    gradients,
    make,
    module,
    noise,
)
from vae import objectives
from vae.objectives import SUBSAMPLED_ESTIMATORS
from vae.resampling import draw_by_weight

K, B = 12, 6
GRID = 20_000
CASES = [
    (name, spread, count)
    for name, spread in (("equal", 0.0), ("unequal", 2.0), ("one", 60.0), ("underflown", 2000.0))
    for count in (1, 4, 11, 12)
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def evenly(count: int) -> Tensor:
    """Midpoints of [0, 1): a mean over them is one over a uniform number, to 1 / count."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize(("name", "spread", "count"), CASES)
def test_each_sample_counts_by_its_weight_in_the_mean(name: str, spread: float, count: int):
    weights = (spread * torch.randn(K)).softmax(0)
    everywhere = weights.unsqueeze(-1).expand(-1, GRID)
    places, probabilities = draw_by_weight(everywhere, count, evenly(GRID))
    drawn = torch.zeros(K, GRID, dtype=torch.float64).scatter_(0, places, 1.0)
    assert (drawn.sum(0) == count).all(), "all different"
    shares = weights.double().gather(0, places.flatten()).view_as(places) / probabilities
    mean = torch.zeros(K, GRID, dtype=torch.float64).scatter_(0, places, shares).mean(1)
    torch.testing.assert_close(mean, weights.double(), rtol=0, atol=2 / GRID)


def test_weights_above_the_threshold_are_kept_and_the_rest_are_drawn_in_proportion():
    weights = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).unsqueeze(-1).expand(-1, GRID)
    places, probabilities = draw_by_weight(weights, 3, evenly(GRID))
    found = torch.zeros(5, GRID, dtype=torch.float64).scatter_(0, places, probabilities)
    expected = [1.0, 1.0, 0.5, 0.3, 0.2]  # 0.2 are left for one more
    for row, probability in zip(found, expected, strict=True):
        torch.testing.assert_close(row[row > 0], torch.full_like(row[row > 0], probability))
        assert (row > 0).double().mean().item() == pytest.approx(probability, abs=1e-3)


@pytest.mark.parametrize("count", [0, 13])
def test_no_more_than_there_are(count: int):
    with pytest.raises(ValueError, match=f"expected 1 to 12, got {count}"):
        draw_by_weight(torch.full((K, B), 1 / K), count, torch.zeros(B))


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", list(SUBSAMPLED_ESTIMATORS))
def test_gradient_has_the_mean_of_all_samples_gradient(kind: str, name: str):
    """One example many times, each drawn by another v."""
    model, copies = make(**MODELS[kind]), 4000
    x, eps = binary(1), noise(model, K, 1)
    everything = module(model, name, K)
    few = module(model, name, K, backward_samples=4)
    expected = gradients(everything, x, eps)
    found = gradients(few, x.expand(copies, -1), eps.expand(-1, copies, -1), evenly(copies))
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key] / copies, value, rtol=5e-3, atol=5e-3 * value.abs().max().item(), msg=key
        )
    one = gradients(few, x, eps, torch.tensor([0.5]))
    assert any(not torch.allclose(one[key], value) for key, value in expected.items())


@pytest.mark.parametrize("at_once", [1, 2**22])
@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", list(SUBSAMPLED_ESTIMATORS))
def test_values_are_those_of_all_samples(
    kind: str, name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(objectives, "CHUNK_VALUES", {"cpu": at_once})
    model = make(**MODELS[kind])
    x, eps = binary(B), noise(model, K, B)
    expected = module(model, name, K)(x, eps)
    found = module(model, name, K, backward_samples=2)(x, eps, v=torch.rand(B))
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad


@pytest.mark.parametrize("name", list(SUBSAMPLED_ESTIMATORS))
def test_variance_lies_between_that_of_all_and_that_of_as_many_alone(name: str):
    """Of the encoder's gradient, over ε and v."""
    model, copies = make(), 4000
    x, v = binary(1).expand(copies, -1), torch.rand(copies)
    eps = noise(model, K, copies)
    everything, drawn, alone = (
        encoder_gradients(module(model, name, k, backward_samples=few), x, eps[:k], v).var(0).sum()
        for k, few in ((K, None), (K, 3), (3, None))
    )
    assert everything < drawn < 0.5 * alone


@pytest.mark.parametrize("name", list(SUBSAMPLED_ESTIMATORS))
def test_without_v_nothing_is_trained(name: str):
    model = make()
    few = module(model, name, K, backward_samples=2)
    with pytest.raises(ValueError, match="backward_samples"):
        few(binary(), noise(model, K, 5))
    with torch.no_grad():
        few(binary(), noise(model, K, 5))  # validation draws none
