"""The variational autoencoder: networks return tensors, the model returns distributions.

Shapes: B batch, L latent values (all layers together), K samples. All terms in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vae.checks import check_name
from vae.models.kl import kl_divergence
from vae.models.latent_distributions import HierarchicalPrior, LatentDistribution, Reparameterized
from vae.models.likelihoods import LIKELIHOODS, SPACES, check_likelihood
from vae.models.networks import ACTIVATIONS, Decoder, Encoder, check_network
from vae.models.posteriors import POSTERIORS, ConditionalPosterior, HierarchicalPosterior
from vae.models.priors import PRIORS, ConditionalNormal

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
"""Of the networks' matrix products; None: that of the parameters."""


class ElboTerms(NamedTuple):
    """ELBO = log p(x|z) - KL(q(z|x)‖p(z)), each (B,), in nats."""

    log_px_z: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        return self.log_px_z - self.kl


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """All that fixes a model's shape; with its weights, all that fixes the model.

    Raises ValueError naming every faulty key of params.yaml at once.
    """

    data_shape: tuple[int, ...]  # (channels, height, width) or (columns,)
    space: str  # binary | grey8 | continuous
    latent_dim: int | tuple[int, ...]  # several stochastic layers: from the data upwards
    likelihood: str
    network: str = "mlp"
    hidden: tuple[int, ...] = (200, 200)  # mlp: widths; conv: channels, halving the image each time
    activation: str = "tanh"
    posterior: str = "diagonal"
    prior: str = "normal"
    min_scale: float = 1e-3  # floor of learned scales, in standardised units
    num_components: int = 5  # components of mixture likelihoods
    prior_components: int = 50  # vamp: pseudo-inputs; mixture: Gaussians

    def __post_init__(self) -> None:
        for name in ("data_shape", "hidden", "latent_dim"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.latent_dim, tuple) and len(self.latent_dim) == 1:
            object.__setattr__(self, "latent_dim", self.latent_dim[0])
        faults = list(self._faults())
        if faults:
            raise ValueError("\n".join(faults))

    def _faults(self) -> Iterable[str]:
        sized = _is_sizes(self.data_shape) and len(self.data_shape) > 0
        if not sized:
            yield f"data_shape: expected positive integers, got {self.data_shape!r}"
        if not (_is_size(self.latent_dim) or (_is_sizes(self.latent_dim) and self.latent_dim)):
            yield (
                "model.latent_dim: expected a positive integer or several, one for each "
                f"stochastic layer, such as 32 or [100, 50], got {self.latent_dim!r}"
            )
        if not _is_sizes(self.hidden):
            yield f"model.hidden: expected a list of positive integers, got {self.hidden!r}"
        elif sized:
            try:
                check_network(self.network, self.data_shape, self.hidden)
            except ValueError as error:
                yield str(error)
        yield from check_name("data.space", self.space, SPACES)
        yield from check_name("model.activation", self.activation, ACTIVATIONS)
        yield from check_name("model.posterior", self.posterior, POSTERIORS)
        yield from check_name("model.prior", self.prior, PRIORS)
        if not isinstance(self.likelihood, str):
            yield f"model.likelihood: expected a name, got {self.likelihood!r}"
        elif self.space in SPACES:
            try:
                check_likelihood(self.likelihood, self.space)
            except ValueError as error:
                yield str(error)
        if not (_is_number(self.min_scale) and 0 < self.min_scale < 1):
            yield f"model.min_scale: expected a number between 0 and 1, got {self.min_scale!r}"
        for name in ("num_components", "prior_components"):
            if not _is_size(getattr(self, name)):
                yield f"model.{name}: expected a positive integer, got {getattr(self, name)!r}"

    @property
    def latent_dims(self) -> tuple[int, ...]:
        """The size of each stochastic layer, from the data upwards."""
        return self.latent_dim if isinstance(self.latent_dim, tuple) else (self.latent_dim,)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> VAEConfig:
        """The inverse of `to_dict`; raises ValueError naming unknown or missing keys."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise ValueError(f"model: unknown keys {unknown}; known: {sorted(known)}")
        missing = sorted({"data_shape", "space", "latent_dim", "likelihood"} - set(content))
        if missing:
            raise ValueError(f"model: missing keys {missing}")
        return cls(**content)


class VAE(nn.Module):
    """p(x, z) = p(x|z) p(z) with an approximate posterior q(z|x).

    Kingma and Welling (2014); with several latent sizes the hierarchical model of Burda, Grosse
    and Salakhutdinov (2016): z is the concatenation of all layers and p(x|z) reads the first.
    x is what the data space says (0/1, 0…255, raw units) in any numeric dtype.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.latent_dims
        posterior = POSTERIORS[config.posterior]
        width = max(config.hidden, default=64)
        shared = {"hidden": config.hidden, "activation": config.activation}
        data = {"data_shape": config.data_shape, "network": config.network, **shared}

        self.posterior_family = posterior(latent_dim=sizes[0], width=width)
        self.encoder = Encoder(num_outputs=self.posterior_family.num_outputs, **data)
        self.likelihood_family = LIKELIHOODS[config.likelihood](
            space=config.space,
            data_shape=config.data_shape,
            min_scale=config.min_scale,
            num_components=config.num_components,
        )
        self.decoder = Decoder(
            latent_dim=sizes[0],
            outputs_per_value=self.likelihood_family.outputs_per_value,
            **data,
        )

        self.upward = nn.ModuleList()  # q(z_{i+1} | z_i)
        self.downward = nn.ModuleList()  # p(z_i | z_{i+1})
        for depth, (lower, upper) in enumerate(pairwise(sizes), 1):
            # as in the paper: 200 units below z1 = 100, and 100 between z1 and z2
            hidden = tuple(max(h // 2**depth, lower) for h in config.hidden)
            family = posterior(latent_dim=upper, width=max(hidden, default=64))
            self.upward.append(ConditionalPosterior(lower, hidden, config.activation, family))
            self.downward.append(ConditionalNormal(upper, lower, hidden, config.activation))

        self.prior_family = PRIORS[config.prior](
            latent_dim=sizes[-1],
            num_components=config.prior_components,
            input_shape=config.data_shape if len(sizes) == 1 else (sizes[-2],),
        )

        loc, scale = {"binary": (0.5, 1.0), "grey8": (127.5, 127.5), "continuous": (0.0, 1.0)}[
            config.space
        ]
        self._products: torch.dtype | None = None
        # Raw units of a column may be 1e-30 or 1e30, or lie far from 0.
        dtype = torch.float64 if config.space == "continuous" else None
        self.register_buffer("data_loc", torch.full(config.data_shape, loc, dtype=dtype))
        self.register_buffer("data_scale", torch.full(config.data_shape, scale, dtype=dtype))
        self.data_loc: Tensor
        self.data_scale: Tensor

    @contextmanager
    def products_in(self, precision: str) -> Iterator[None]:
        """Within the block, encoder and decoder take their matrix products in `precision`.

        fp32: as the parameters are. bf16: about three decimal digits, at twice the speed or more
        where the device has units for it, else slower. Distributions, sums and densities keep the
        parameters' precision, and so do the conditionals between latent layers. Raises ValueError
        for another name.
        """
        for fault in check_name("precision", precision, PRECISIONS):
            raise ValueError(fault)
        before, self._products = self._products, PRECISIONS[precision]
        try:
            yield
        finally:
            self._products = before

    @property
    def precision(self) -> str:
        """The present precision of the networks' matrix products, a name in `PRECISIONS`."""
        return next(name for name, dtype in PRECISIONS.items() if dtype == self._products)

    @property
    def noise_dim(self) -> int:
        """How many standard normal numbers make one z."""
        return sum(self.config.latent_dims)

    @property
    def dequantizes(self) -> bool:
        """Whether training maximises a dequantised density and so needs u."""
        return bool(self.likelihood_family.dequantizes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of all that is computed from them."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def set_data_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Centre the encoder and start the decoder at the training split's statistics.

        Args: mean and standard deviation of each value, data_shape, in data units. They are
        buffers, saved with the weights. In `continuous` they also standardise the data, and the
        likelihood accounts for the Jacobian.
        """
        mean = torch.as_tensor(mean).to(self.data_loc).reshape(self.config.data_shape)
        std = torch.as_tensor(std).to(self.data_loc).reshape(self.config.data_shape)
        self.data_loc.copy_(mean)
        if self.config.space == "continuous":
            self.data_scale.copy_(torch.where(std > 0, std, 1.0))
        elif self.config.space == "grey8":  # one scale for all: a border pixel must not be blown up
            self.data_scale.copy_(std.square().mean().sqrt().clamp(min=1.0).expand_as(std))
        self.decoder.set_output_bias(self.likelihood_family.initial_bias(mean, std))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VAE:
        """`to`, `float`, `half`, …: the statistics of `continuous` data stay in float64."""
        kept = {"data_loc": self.data_loc, "data_scale": self.data_scale}
        super()._apply(fn, recurse)
        if self.config.space == "continuous":
            for name, value in kept.items():
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def check_data(self, x: Tensor) -> None:
        """Raise ValueError unless x is (B, *data_shape)."""
        if tuple(x.shape[1:]) != self.config.data_shape or x.dim() == 0:
            expected = ", ".join(map(str, ("B", *self.config.data_shape)))
            raise ValueError(f"x: expected shape ({expected}), got {tuple(x.shape)}")

    def posterior(self, x: Tensor) -> Reparameterized:
        """q(z|x): x (B, *data_shape) -> batch (B,), event (L,)."""
        self.check_data(x)
        first = self._encode(self._standardised(x))
        if not self.upward:
            return first
        return HierarchicalPosterior(first, list(self.upward), self.config.latent_dims)

    def prior(self) -> LatentDistribution:
        """p(z): batch (), event (L,)."""
        top = self.prior_family(self.upward[-1] if self.upward else self._encode_pseudo_inputs)
        if not self.upward:
            return top
        return HierarchicalPrior(top, list(self.downward), self.config.latent_dims)

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x|z): z (*batch, L) -> batch (*batch,), event data_shape, x in data units."""
        if z.shape[-1] != self.noise_dim:
            raise ValueError(f"z: expected {self.noise_dim} latent values, got {z.shape[-1]}")
        with self._network():
            outputs = self.decoder(z[..., : self.config.latent_dims[0]])
        return self.likelihood_family(outputs.to(self.dtype), self.data_loc, self.data_scale)

    def log_px_z(self, x: Tensor, z: Tensor, u: Tensor | None = None) -> Tensor:
        """log p(x|z): x (B, *data_shape), z (*, B, L) -> (*, B), in nats.

        With u (B, *data_shape), uniform on [0, 1), density families on 8-bit data give their
        training objective log p((x+u)/256) - D log 256; otherwise the reporting measure.
        """
        p_x = self.likelihood(z)
        if u is None or not self.dequantizes:
            return p_x.log_prob(x.to(self.data_loc.dtype))
        return p_x.dequantized_log_prob(x.to(self.dtype), u.to(self.dtype))  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor, eps: Tensor | None = None, u: Tensor | None = None) -> ElboTerms:
        """ELBO terms (B,): KL in closed form where there is one, else by Monte Carlo.

        Args: eps (B, L) or (K, B, L), standard normal, drawn here if None; u as in `log_px_z`.
        """
        if eps is None:
            eps = torch.randn(len(x), self.noise_dim, dtype=self.dtype, device=self.data_loc.device)
        eps = eps.reshape(-1 if eps.numel() else 1, len(x), self.noise_dim)
        q, p = self.posterior(x), self.prior()
        kl = kl_divergence(q, p)
        if kl is None:
            z, log_q = q.from_noise_with_log_prob(eps)
            kl = (log_q - p.log_prob(z)).mean(0)
        else:
            z = q.from_noise(eps)
        return ElboTerms(self.log_px_z(x, z, u).mean(0), kl)

    def _standardised(self, x: Tensor) -> Tensor:
        return ((x.to(self.data_loc.dtype) - self.data_loc) / self.data_scale).to(self.dtype)

    def _encode(self, standardised: Tensor) -> Reparameterized:
        with self._network():
            outputs = self.encoder(standardised)
        return self.posterior_family(outputs.to(self.dtype))

    def _network(self) -> AbstractContextManager[Any]:
        if self._products is None:
            return nullcontext()
        return torch.autocast(self.data_loc.device.type, self._products)

    def _encode_pseudo_inputs(self, pseudo_inputs: Tensor) -> Reparameterized:
        """q(z|u) at pseudo-inputs around the data's mean, inside the data's range."""
        if self.config.space == "continuous":
            return self._encode(pseudo_inputs)
        return self._encode(
            self._standardised(_PSEUDO_INPUTS[self.config.space](pseudo_inputs, self.data_loc))
        )


def _squash(values: Tensor, mean: Tensor) -> Tensor:
    return torch.sigmoid(values + torch.logit(mean.clamp(0.01, 0.99)))


_PSEUDO_INPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "binary": _squash,
    "grey8": lambda values, loc: 255 * _squash(values, loc / 255),
}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_size(v) for v in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
