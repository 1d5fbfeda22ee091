"""The training's faster paths against plain torch: the same losses from the same noise."""

import copy
import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from tests.vae.evidence.test_precision import SHAPE, dataset
from vae.data import NoiseShape
from vae.models import VAE, VAEConfig, bounded_log_scale
from vae.objectives import Objective
from vae.training import TrainingConfig, fit

EPOCHS = 4


def plain_terms(model, objective, x, eps):
    """log p(x|z), KL and the bound of a batch, by torch.distributions alone."""
    loc, raw = model.encoder((x - model.data_loc) / model.data_scale).chunk(2, -1)
    q = Normal(loc, bounded_log_scale(raw).exp())
    p = Normal(torch.zeros_like(loc), torch.ones_like(loc))
    z = q.loc + q.scale * eps
    log_px_z = Bernoulli(logits=model.decoder(z).squeeze(2)).log_prob(x).flatten(2).sum(-1)
    if objective.name == "elbo":
        kl = kl_divergence(q, p).sum(-1)
        return log_px_z.mean(0), kl, log_px_z.mean(0) - kl
    kl = (q.log_prob(z) - p.log_prob(z)).sum(-1)
    bound = torch.logsumexp(log_px_z - kl, 0) - math.log(len(z))
    return log_px_z.mean(0), kl.mean(0), bound


def plain_losses(model, objective, config):
    """Each epoch's mean ELBO, trained by torch's own unfused AdamW."""
    data, noise = dataset(), NoiseShape(objective.num_samples, 3, False, torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=0, fused=False, foreach=False
    )
    for epoch in range(1, config.epochs + 1):
        elbo = 0.0
        for batch in data.train_batches(
            noise, batch_size=config.batch_size, seed=0, epoch=epoch, rank=0, world_size=1
        ):
            log_px_z, kl, bound = plain_terms(model, objective, batch.x, batch.eps)
            elbo += (log_px_z - kl).sum().item()
            optimizer.zero_grad()
            (-bound.mean()).backward()
            optimizer.step()
        yield elbo / data.num_train


@pytest.mark.parametrize(("name", "num_samples"), [("elbo", 1), ("elbo", 3), ("iwae", 5)])
def test_losses_are_those_of_plain_torch(name: str, num_samples: int):
    config = TrainingConfig(epochs=EPOCHS, batch_size=64, learning_rate=1e-3, schedule="constant")
    objective = Objective(name=name, num_samples=num_samples)
    torch.manual_seed(0)
    shape = {"data_shape": SHAPE, "space": "binary", "likelihood": "bernoulli"}
    model = VAE(VAEConfig(latent_dim=3, network="mlp", hidden=(32, 32), **shape))
    model.set_data_statistics(*dataset().statistics())
    expected = list(plain_losses(copy.deepcopy(model), objective, config))
    found = [stats.train_elbo for stats in fit(model, dataset(), config, objective=objective)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] > found[0] + 1
