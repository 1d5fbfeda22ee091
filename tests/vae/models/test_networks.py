"""Networks: what each output can depend on, initialisation, any image size."""

import math
from typing import Any

import pytest
import torch

from vae.models import ACTIVATIONS, Decoder, Encoder, ResidualBlock, Tanh, mlp

SIZES = [(1, 28, 28), (3, 5, 3), (2, 1, 1), (1, 7, 1), (1, 1, 9), (1, 6, 11)]


def encoder(data_shape=(1, 4, 3), num_outputs=5, network="mlp", hidden=(7,), activation="tanh"):
    return Encoder(
        data_shape=data_shape,
        num_outputs=num_outputs,
        network=network,
        hidden=hidden,
        activation=activation,
    )


def decoder(
    data_shape=(1, 4, 3), latent_dim=2, outputs=3, network="mlp", hidden=(7,), activation="tanh"
):
    return Decoder(
        latent_dim=latent_dim,
        outputs_per_value=outputs,
        data_shape=data_shape,
        network=network,
        hidden=hidden,
        activation=activation,
    )


def test_mlp_without_hidden_layers_is_affine():
    network = encoder(hidden=()).double()
    x = torch.randn(6, 1, 4, 3, dtype=torch.float64)
    expected = x.flatten(1) @ network.output.weight.T + network.output.bias
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tanh", torch.tanh),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x * torch.sigmoid(x)),
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    ],
)
def test_mlp_computes_its_formula(name, function):
    assert name in ACTIVATIONS
    network = mlp(3, (4, 5), 2, name).double()
    first, second, last = (m for m in network if isinstance(m, torch.nn.Linear))
    x = torch.randn(7, 3, dtype=torch.float64)
    hidden = function(x @ first.weight.T + first.bias)
    hidden = function(hidden @ second.weight.T + second.bias)
    torch.testing.assert_close(network(x), hidden @ last.weight.T + last.bias)


def test_tanh_without_a_gradient_is_tanh():
    x = torch.cat([torch.linspace(-20, 20, 100_001), torch.logspace(-9, 0, 1000)])
    module, before = Tanh(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(module(x), x.double().tanh().float(), rtol=0, atol=2e-7)
        exact = x.double()
        assert torch.equal(module(exact), exact.tanh())
        half = x.bfloat16()
        assert torch.equal(module(half), half.tanh())
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(module(half), half.float().tanh(), rtol=0, atol=2e-7)
    assert torch.equal(x, before)


def test_glorot_initialisation():
    torch.manual_seed(0)
    linear: Any = mlp(300, (200,), 10, "tanh")[0]
    bound = math.sqrt(6 / (300 + 200))
    assert linear.weight.abs().max() <= bound
    assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not linear.bias.any()


@pytest.mark.parametrize("data_shape", SIZES)
@pytest.mark.parametrize("hidden", [(3,), (4, 3, 5)])
def test_every_pixel_reaches_the_encoding_and_is_reached_by_the_code(data_shape, hidden):
    torch.manual_seed(1)
    down = encoder(data_shape, 2, "conv", hidden, "silu").double()
    up = decoder(data_shape, 2, 2, "conv", hidden, "silu").double()
    x = torch.randn(3, *data_shape, dtype=torch.float64, requires_grad=True)
    down(x).sum().backward()
    assert (x.grad != 0).all()
    z = torch.randn(2, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(up, z)
    assert jacobian.shape == (2, *data_shape, 2)
    # the corner, the last row and column included: cropping must not cut connections
    assert (jacobian.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_an_example_does_not_depend_on_its_batch(network):
    torch.manual_seed(2)
    data_shape = (2, 5, 3)
    down = encoder(data_shape, 4, network, (6, 5)).double()
    up = decoder(data_shape, 3, 2, network, (6, 5)).double()
    x = torch.randn(7, *data_shape, dtype=torch.float64)
    torch.testing.assert_close(down(x)[2:3], down(x[2:3]))
    z = torch.randn(4, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(up(z)[3, 5], up(z[3, 5]))
    assert up(z).shape == (4, 7, 2, *data_shape)
    assert up(z[:, :0]).shape == (4, 0, 2, *data_shape)
    assert down(x[:0]).shape == (0, 4)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_output_bias_is_the_output_of_a_silent_body(network):
    up = decoder((2, 5, 3), 3, 4, network, (6,))
    bias = torch.randn(4, 2, 5, 3)
    up.set_output_bias(bias)
    torch.nn.init.zeros_(up.output.weight)
    assert torch.equal(up(torch.randn(9, 3)), bias.expand(9, -1, -1, -1, -1))


def test_residual_block_starts_as_the_identity_and_adds():
    block: Any = ResidualBlock(3, "relu")
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(block(x), x)
    torch.nn.init.ones_(block.change[-1].bias)
    torch.testing.assert_close(block(x), x + 1)


@pytest.mark.parametrize(
    ("data_shape", "network", "hidden", "words"),
    [
        ((12,), "conv", (8,), ["model.network", "(12,)", "mlp"]),
        ((28, 28), "conv", (8,), ["model.network", "(28, 28)", "channels"]),
        ((1, 28, 28), "conv", (), ["model.hidden", "channels"]),
        ((12,), "transformer", (8,), ["model.network", "transformer", "mlp, conv"]),
    ],
)
def test_refusals_name_the_key_and_the_way_out(data_shape, network, hidden, words):
    with pytest.raises(ValueError, match="model") as caught:
        encoder(data_shape, 4, network, hidden)
    assert all(word in str(caught.value) for word in words)
