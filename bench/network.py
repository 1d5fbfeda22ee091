"""The network of most measurements, that of Burda, Grosse and Salakhutdinov's table 1 (2016)."""

from vae import VAEConfig

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
