"""The network of most measurements, that of Burda, Grosse and Salakhutdinov's table 1 (2016)."""

from torch import Tensor, nn

from vae.models import VAE, VAEConfig

TABLE_1 = VAEConfig(
    data_shape=(1, 28, 28),
    space="binary",
    latent_dim=50,
    likelihood="bernoulli",
    network="mlp",
    hidden=(200, 200),
    activation="tanh",
    posterior="diagonal",
    prior="normal",
)


def arrays_of(model: VAE) -> dict[str, Tensor]:
    """A perceptron's weights by the names that bench/peers.py gives them."""
    weights = {"data_loc": model.data_loc, "data_scale": model.data_scale}
    for name, network in (("encoder", model.encoder), ("decoder", model.decoder)):
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        for index, layer in enumerate(layers):
            weights[f"{name}.{index}.weight"] = layer.weight.detach()
            weights[f"{name}.{index}.bias"] = layer.bias.detach()
    return weights
