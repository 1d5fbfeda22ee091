"""bf16 matrix products: taken where asked for, close to fp32, and nowhere else."""

import pytest
import torch

from vae.data import Dataset
from vae.evidence import importance_sampling
from vae.models import VAE, VAEConfig
from vae.training import TrainingConfig, TrainingState, fit

SHAPE = (1, 6, 6)
CONFIG = TrainingConfig(epochs=5, batch_size=64, learning_rate=3e-3)
BF16 = TrainingConfig(epochs=5, batch_size=64, learning_rate=3e-3, precision="bf16")


def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 2, (464, 1, 1, 1), generator=generator)
    noise = torch.rand(464, *SHAPE, generator=generator)
    pixels = (20 + 130 * kind + 60 * noise).to(torch.uint8)
    return Dataset(train=pixels[:400], valid=(pixels[400:] > 100).to(torch.uint8), binarize=True)


def trained(config: TrainingConfig, network: str = "mlp") -> tuple[VAE, list[float]]:
    torch.manual_seed(0)
    shape = {"data_shape": SHAPE, "space": "binary", "likelihood": "bernoulli"}
    hidden = (32, 32) if network == "mlp" else (8,)
    model = VAE(VAEConfig(latent_dim=3, network=network, hidden=hidden, **shape))
    model.set_data_statistics(*dataset().statistics())
    return model, [stats.train_elbo for stats in fit(model, dataset(), config)]


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_training_in_bf16_is_close_to_fp32_with_weights_and_state_in_fp32(network: str):
    (_, exact), (model, found) = trained(CONFIG, network), trained(BF16, network)
    assert found == pytest.approx(exact, rel=0.02)
    assert found != exact
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_training_in_bf16_goes_on_to_the_bit():
    whole, _ = trained(BF16)
    state = TrainingState()
    torch.manual_seed(0)
    model = VAE(whole.config)
    model.set_data_statistics(*dataset().statistics())
    for stats in fit(model, dataset(), BF16, state):
        if stats.epoch == 2:
            break
    list(fit(model, dataset(), BF16, state))
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("proposal", ["encoder", "refined"])
def test_log_px_in_bf16_is_close_to_fp32(proposal: str):
    """By the same noise: what differs is rounding alone."""
    model, _ = trained(CONFIG)
    exact, found = (
        importance_sampling(
            model,
            dataset().valid,
            500,
            proposal=proposal,
            precision=precision,
            generator=torch.Generator().manual_seed(1),
        )
        for precision in ("fp32", "bf16")
    )
    difference = (found.log_px - exact.log_px).double()
    assert difference.abs().max() < 0.1
    assert abs(difference.mean()) < 0.01
    assert difference.abs().max() > 0


def test_the_precision_ends_with_the_block_also_by_a_fault():
    model, _ = trained(CONFIG)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    before = model.likelihood(z).mean
    with model.products_in("bf16"):
        inside = model.likelihood(z).mean
        with model.products_in("fp32"):
            assert torch.equal(model.likelihood(z).mean, before)
        assert torch.equal(model.likelihood(z).mean, inside)
    assert not torch.equal(inside, before)
    with pytest.raises(ZeroDivisionError), model.products_in("bf16"):
        raise ZeroDivisionError
    assert torch.equal(model.likelihood(z).mean, before)


def test_an_unknown_precision_is_told():
    model, _ = trained(TrainingConfig(epochs=1))
    with pytest.raises(ValueError, match="precision: 'fp16' is unknown, known: fp32, bf16"):
        importance_sampling(model, dataset().valid, 5, precision="fp16")
    with pytest.raises(ValueError, match=r"training\.precision: 'fp16' is unknown"):
        TrainingConfig(precision="fp16")
