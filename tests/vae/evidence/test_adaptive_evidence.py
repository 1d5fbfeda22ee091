"""Importance sampling that stops at a wanted standard error, against exact values and fixed K."""

import math

import pytest
import torch

from tests.vae.evidence.test_evidence import bits, random_model, small_vae
from vae.evidence import STOP_ESS, STOP_KHAT, Evidence, example_generators, importance_sampling

STOPS = [256, 512, 1024, 2048, 4096, 5000]


def assert_equal(found: Evidence, expected: Evidence) -> None:
    for name in ("log_px", "se", "ess", "khat", "elbo", "log_px_z", "samples"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), equal_nan=True)
    assert found.ladder.keys() == expected.ladder.keys()
    for k in found.ladder:
        torch.testing.assert_close(found.ladder[k], expected.ladder[k])


@pytest.mark.parametrize(
    "changes",
    [{}, {"posterior": "full"}, {"posterior": "flow"}, {"prior": "vamp"}, {"latent_dim": (3, 2)}],
    ids=str,
)
def test_an_error_out_of_reach_takes_all_samples_and_changes_nothing(changes):
    model, x = small_vae(**changes), bits(5)
    options = {"num_samples": 700, "proposal": "encoder"}
    fixed = importance_sampling(model, x, **options, generator=example_generators(x, 0))
    adaptive = importance_sampling(
        model, x, **options, generator=example_generators(x, 0), target_se=1e-9
    )
    assert_equal(adaptive, fixed)
    assert adaptive.samples.tolist() == [700] * 5


@pytest.mark.parametrize(("proposal", "target"), [("encoder", 0.02), ("refined", 0.005)])
def test_each_example_has_the_estimate_of_as_many_samples_as_it_took(proposal, target):
    model = small_vae()
    x = bits(60)
    options = {"proposal": proposal, "target_se": target}
    found = importance_sampling(model, x, 5000, generator=example_generators(x, 3), **options)
    assert len(found.samples.unique()) > 1
    assert set(found.samples.tolist()) <= set(STOPS)
    for index in range(0, 60, 7):
        one = x[index : index + 1]
        K = int(found.samples[index])
        alone = importance_sampling(
            model, one, K, generator=example_generators(one, 3), proposal=proposal
        )
        torch.testing.assert_close(found.log_px[index], alone.log_px[0])
        torch.testing.assert_close(found.khat[index], alone.khat[0])
        assert {k: found.ladder[k][index].item() for k in (1, 10, 100)} == pytest.approx(
            {k: alone.ladder[k].item() for k in (1, 10, 100)}
        )
        assert found.ladder[5000][index] == found.log_px[index]


def test_it_stops_where_the_error_is_small_and_can_be_trusted():
    fa, g = random_model(20, 8)
    x, _ = fa.sample(400, generator=g)
    found = importance_sampling(
        fa.as_vae(shift=0.1, widen=1.2), x, 5000, generator=g, target_se=0.03
    )
    stopped = found.samples < 5000
    assert stopped.double().mean() > 0.9
    assert (found.se[stopped] <= 0.03).all()
    assert (found.ess[stopped] >= STOP_ESS).all()
    assert (found.khat[stopped] < STOP_KHAT).all()
    error = (found.log_px - fa.log_prob(x)) / found.se
    assert error.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
    assert error.mean().abs() < 4 / math.sqrt(400)


def test_a_heavy_tail_never_stops_however_small_its_error_looks():
    fa, g = random_model(40, 8)
    x, _ = fa.sample(50, generator=g)
    found = importance_sampling(fa.as_vae(widen=0.6), x, 2000, generator=g, target_se=10.0)
    doubtful = found.khat >= STOP_KHAT
    assert doubtful.double().mean() > 0.5
    assert (found.samples[doubtful] == 2000).all()


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan])
def test_a_target_that_is_no_error_is_refused(target):
    with pytest.raises(ValueError, match="target_se must be above 0; found"):
        importance_sampling(small_vae(), bits(2), 300, target_se=target)


def test_nothing_to_score():
    model = small_vae()
    empty = bits(1)[:0]
    assert importance_sampling(model, empty, 300, target_se=0.1).log_px.shape == (0,)
