"""What `test_paths` runs with `vae/fast`, without it and with it switched off: prints figures."""

from __future__ import annotations

import importlib.util
import json
import sys

import torch

from vae import VAE, VAEConfig, load, save
from vae.data import Dataset
from vae.evidence import importance_sampling
from vae.objectives import Objective
from vae.training import TrainingConfig, TrainingState, fit

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = VAEConfig(
        data_shape=(1, 6, 6), space="binary", latent_dim=3, likelihood="bernoulli", hidden=(8,)
    )
    model = VAE(config)
    x = torch.randint(2, (48, 1, 6, 6), generator=torch.Generator().manual_seed(1)).byte()
    data = Dataset(train=x, valid=x[:16])
    bounds = []
    for objective in (Objective(), Objective(name="iwae", num_samples=5)):
        training = TrainingConfig(epochs=2, batch_size=16, seed=0)
        for stats in fit(model, data, training, TrainingState(), objective=objective):
            bounds.append(stats.valid_bound)
    save(model, sys.argv[1])
    found = importance_sampling(
        load(sys.argv[1]), x[:8], 300, generator=torch.Generator().manual_seed(2)
    )
    spec = importlib.util.find_spec("vae.fast")
    fast = spec is not None and spec.origin is not None
    print(json.dumps({"bounds": bounds, "log_px": found.log_px.tolist(), "fast": fast}))
