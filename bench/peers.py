"""What a user would pick instead, measured: runs in the peers' own environment (bench/compare.py).

    python bench/peers.py train NAME DATA --batch 128 --threads 2
    python bench/peers.py evidence NAME DATA --batch 1000 --threads 2 \\
        --weights W --images 20 --samples 5000

For each line of standard input `train` trains an epoch, and `evidence` estimates log p(x); each
time it prints a JSON object with the `rate`. Every contender trains the same network on all of
MNIST, 784-200-200-z50 tanh, Bernoulli, fp32, Adam.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

LATENT = 50
IMAGES = 60_000  # of an epoch


def body(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh())


def finish(device: torch.device) -> None:
    """Wait for what was launched on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Epochs:
    """So many epochs, each timed; with `asked`, each when a line comes on standard input.

    share: of an epoch, how much is really run.
    """

    def __init__(self, device: torch.device, count: int, *, asked: bool = False) -> None:
        self.device, self.count, self.asked = device, count, asked
        self.share = 1.0
        self.seconds: list[float] = []

    def begin(self) -> None:
        if self.asked and not sys.stdin.readline():
            sys.exit()
        self.start = time.perf_counter()

    def end(self) -> None:
        finish(self.device)
        self.seconds.append((time.perf_counter() - self.start) / self.share)
        if self.asked:
            print(json.dumps({"rate": IMAGES / self.seconds[-1]}), flush=True)

    def __iter__(self) -> Iterator[None]:
        for _ in range(self.count):
            self.begin()
            yield
            self.end()


class BareVAE(nn.Module):
    """The paper's network as one would write it by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*body(784), nn.Linear(200, 2 * LATENT))
        self.decoder = nn.Sequential(*body(LATENT), nn.Linear(200, 784))

    def loss(self, x: Tensor) -> Tensor:
        loc, log_var = self.encoder(x).chunk(2, -1)
        z = loc + (0.5 * log_var).exp() * torch.randn_like(loc)
        distortion = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        kl = -0.5 * (1 + log_var - loc.square() - log_var.exp()).sum()
        return (distortion + kl) / len(x)


def train_bare(grey: Tensor, batch: int, epochs: Epochs) -> None:
    """Data as a tensor, dynamic binarisation in the batch, fused Adam, no framework."""
    model = BareVAE().to(grey.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    share = grey.float() / 255
    for _ in epochs:
        for index in torch.randperm(len(share), device=share.device).split(batch):
            x = share[index]
            loss = model.loss((torch.rand_like(x) < x).float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


class Pictures(Dataset):
    """Images one by one through a transform, as torchvision's data sets give them."""

    def __init__(self, grey: Tensor) -> None:
        from torchvision import transforms

        self.grey = grey.view(-1, 28, 28).cpu().numpy()
        self.transform = transforms.ToTensor()

    def __len__(self) -> int:
        return len(self.grey)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        return self.transform(Image.fromarray(self.grey[index]))


def train_examples(grey: Tensor, batch: int, epochs: Epochs) -> None:
    """The loop of PyTorch's own VAE example: DataLoader, ToTensor, Adam."""
    model = BareVAE().to(grey.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(Pictures(grey), batch_size=batch, shuffle=True)
    for _ in epochs:
        total = 0.0
        for x in loader:
            optimizer.zero_grad()
            loss = model.loss(x.to(grey.device).view(-1, 784))
            loss.backward()
            total += loss.item()
            optimizer.step()


def train_lightning(grey: Tensor, batch: int, epochs: Epochs) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = BareVAE()

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            loss = self.model.loss(batch[0])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

        def on_train_epoch_start(self) -> None:
            epochs.begin()

        def on_train_epoch_end(self) -> None:
            epochs.end()

    data = torch.utils.data.TensorDataset(grey.cpu().float().view(-1, 784) / 255)
    trainer = lightning.Trainer(
        max_epochs=epochs.count,
        accelerator="gpu" if grey.is_cuda else "cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(data, batch_size=batch, shuffle=True))


def pythae_model(weights: dict[str, Tensor] | None = None) -> Any:
    """pythae's VAE with our network, and with our weights where given."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    own = BareVAE() if weights is None else Copied(weights)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = own.encoder

        def forward(self, x: Tensor) -> Any:
            loc, log_var = self.net(x.flatten(1)).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = own.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.net(z).sigmoid().view(-1, 1, 28, 28))

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=LATENT, reconstruction_loss="bce")
    return VAE(config, encoder=Encoder(), decoder=Decoder())


def train_pythae(grey: Tensor, batch: int, epochs: Epochs) -> None:
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    class Clock(TrainingCallback):
        def on_train_step_begin(self, training_config: Any, **_: Any) -> None:
            epochs.begin()

        def on_epoch_end(self, training_config: Any, **_: Any) -> None:
            epochs.end()

    x = grey.cpu().float().view(-1, 1, 28, 28) / 255
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaseTrainer(
            model=pythae_model(),
            train_dataset=BaseDataset(x, torch.zeros(len(x))),
            training_config=BaseTrainerConfig(
                output_dir=folder,
                num_epochs=epochs.count,
                per_device_train_batch_size=batch,
                learning_rate=1e-3,
                no_cuda=not grey.is_cuda,
            ),
            callbacks=[Clock()],
        )
        trainer.train()


class Copied(nn.Module):
    """Our weights in plain layers; our encoder's standardisation and bounded log scale included."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        loc, scale = weights["data_loc"].view(1, -1), weights["data_scale"].view(1, -1)
        encoder = nn.Sequential(*body(784), nn.Linear(200, 2 * LATENT))
        self.decoder = nn.Sequential(*body(LATENT), nn.Linear(200, 784))
        for part, net in (("encoder", encoder), ("decoder", self.decoder)):
            layers = [layer for layer in net if isinstance(layer, nn.Linear)]
            for index, layer in enumerate(layers):
                layer.weight.data = weights[f"{part}.{index}.weight"]
                layer.bias.data = weights[f"{part}.{index}.bias"]

        class Standardised(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = encoder

            def forward(self, x: Tensor) -> Tensor:
                mean, raw = self.net((x - loc) / scale).chunk(2, -1)
                return torch.cat([mean, 20 * torch.tanh(raw / 10)], -1)

        self.encoder = Standardised()


def evidence_pythae(weights: dict[str, Tensor], x: Tensor, samples: int, batch: int) -> list[float]:
    model = pythae_model(weights).eval()
    with torch.inference_mode():
        values = [model.get_nll(one[None], n_samples=samples, batch_size=batch) for one in x]
    return [float(value) for value in values]


def evidence_bare(weights: dict[str, Tensor], x: Tensor, samples: int, batch: int) -> list[float]:
    """Encode once, decode `batch` samples of one image at a time."""
    model = Copied(weights).eval()
    values = []
    with torch.inference_mode():
        for one in x.flatten(1):
            loc, log_var = model.encoder(one[None]).chunk(2, -1)
            parts = []
            for _ in range(samples // batch):
                eps = torch.randn(batch, LATENT, device=x.device)
                z = loc + (0.5 * log_var).exp() * eps
                logits = model.decoder(z)
                log_px_z = -F.binary_cross_entropy_with_logits(
                    logits, one.expand_as(logits), reduction="none"
                ).sum(-1)
                log_ratio = 0.5 * (eps.square() - z.square() + log_var).sum(-1)
                parts.append(log_px_z + log_ratio)
            values.append(torch.cat(parts).logsumexp(0).item() - math.log(samples))
    return values


def train_products(grey: Tensor, batch: int, epochs: Epochs) -> None:
    """The limit: the matrix products of forward and backward pass, and nothing else."""
    widths = [(784, 200), (200, 200), (200, 2 * LATENT), (LATENT, 200), (200, 200), (200, 784)]
    layers = [
        tuple(torch.randn(shape, device=grey.device) for shape in ((batch, i), (i, o), (batch, o)))
        for i, o in widths
    ]
    steps = min(200, len(grey) // batch)
    epochs.share = steps * batch / len(grey)
    with torch.inference_mode():
        for _ in epochs:
            for _ in range(steps):
                for index, (x, weight, gradient) in enumerate(layers):
                    torch.mm(x, weight)
                    torch.mm(x.T, gradient)
                    if index:
                        torch.mm(gradient, weight.T)


def evidence_products(
    weights: dict[str, Tensor], x: Tensor, samples: int, batch: int
) -> list[float]:
    """The limit: the decoder's matrix products alone."""
    z = torch.randn(batch, LATENT, device=x.device)
    layers = [weights[f"decoder.{index}.weight"].T.contiguous() for index in range(3)]
    with torch.inference_mode():
        for _ in range(len(x) * samples // batch):
            h = z
            for layer in layers:
                h = h @ layer
    finish(x.device)
    return []


TRAIN: dict[str, Callable[[Tensor, int, Epochs], None]] = {
    "pythae": train_pythae,
    "lightning": train_lightning,
    "examples": train_examples,
    "bare": train_bare,
    "products": train_products,
}
EVIDENCE: dict[str, Callable[[dict[str, Tensor], Tensor, int, int], list[float]]] = {
    "pythae": evidence_pythae,
    "bare": evidence_bare,
    "products": evidence_products,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("train", "evidence"))
    parser.add_argument("name")
    parser.add_argument("data")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--weights")
    parser.add_argument("--images", type=int)
    parser.add_argument("--samples", type=int)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    arrays = np.load(given.data, allow_pickle=False)
    if given.task == "train":
        grey = torch.from_numpy(arrays["train"])
        TRAIN[given.name](grey, given.batch, Epochs(grey.device, 1_000_000, asked=True))
        return
    stored = np.load(given.weights, allow_pickle=False)
    weights = {name: torch.from_numpy(stored[name]) for name in stored.files}
    x = torch.from_numpy(arrays["test"][: given.images]).float().view(-1, 1, 28, 28)
    evaluate = EVIDENCE[given.name]
    for _ in sys.stdin:
        start = time.perf_counter()
        values = evaluate(weights, x, given.samples, given.batch)
        rate = len(x) * given.samples / (time.perf_counter() - start)
        print(json.dumps({"rate": rate, "log_px": values}), flush=True)


if __name__ == "__main__":
    main()
