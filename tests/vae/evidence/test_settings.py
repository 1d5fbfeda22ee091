"""One settings object: it goes through JSON; an estimate depends on it and the example alone."""

import torch

from vae import VAE, VAEConfig
from vae.evidence import EvidenceSettings


def test_it_goes_through_json_beside_other_figures():
    settings = EvidenceSettings(num_samples=300, seed=7, proposal="refined", target_se=0.1)
    assert EvidenceSettings.of(settings.to_dict() | {"log_px": -1.0, "split": "valid"}) == settings
    assert EvidenceSettings.of({"num_samples": 5}) == EvidenceSettings(num_samples=5)


def test_an_example_s_estimate_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=(3,), space="continuous", latent_dim=2, likelihood="gaussian", hidden=(4,)
    )
    model, x = VAE(config).eval(), torch.randn(20, 3)
    settings = EvidenceSettings(num_samples=300, target_se=0.05, precision="bf16")
    whole = settings.log_px(model, x)
    alone = torch.cat([settings.log_px(model, row) for row in x.split(1)])
    torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-3)
    assert whole.dtype == torch.float64
