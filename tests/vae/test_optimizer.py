"""Adam is torch's own, to the bit, also from its tensors; Muon is what the SVD says."""

import pytest
import torch
from torch import nn

from vae.models import VAE, VAEConfig
from vae.optimizers import AdamW, Muon, is_weight_matrix, orthogonalized


def parameters():
    torch.manual_seed(0)
    unused = nn.Parameter(torch.ones(2))
    return {"a": nn.Parameter(torch.randn(7, 3)), "b": nn.Parameter(torch.randn(40))} | {
        "unused": unused
    }


def gradient(named, step):
    generator = torch.Generator().manual_seed(step)
    for name in ("a", "b"):
        named[name].grad = torch.randn(named[name].shape, generator=generator)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_torchs(weight_decay):
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, weight_decay=weight_decay)
    expected = torch.optim.AdamW(theirs.values(), weight_decay=weight_decay, fused=True)
    for step in range(6):
        for named in (ours, theirs):
            gradient(named, step)
        expected.param_groups[0]["lr"] = rate = 0.1 / (step + 1)
        expected.step()
        if step == 3:  # as a checkpoint does
            optimizer = AdamW(ours, weight_decay=weight_decay, tensors=optimizer.tensors)
        optimizer.step(rate)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in ours.values())


def test_tensors_given_are_copied():
    named = parameters()
    gradient(named, 0)
    first = AdamW(named)
    first.step(0.1)
    before = {key: value.clone() for key, value in first.tensors.items()}
    AdamW(named, tensors=first.tensors).step(0.1)
    assert before.keys() == first.tensors.keys()
    assert all(torch.equal(before[key], first.tensors[key]) for key in before)


def polynomials_of_singular_values(matrix):
    """What `orthogonalized` computes, by the singular value decomposition."""
    u, values, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    values /= values.pow(4).sum().pow(0.25)  # an upper bound of the largest
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (u * values) @ vt, values


@pytest.mark.parametrize("shape", [(5, 30), (30, 5), (12, 12), (1, 7), (7, 1)])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalized_puts_polynomials_to_the_singular_values(shape, size, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * size
    expected, values = polynomials_of_singular_values(matrix)
    found = orthogonalized(matrix)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-4, atol=1e-5)
    assert values.max() < 1.21
    assert values.median() > 0.65


def test_orthogonalized_zero_is_zero_and_one_direction_stays_one():
    assert torch.equal(orthogonalized(torch.zeros(3, 5)), torch.zeros(3, 5))
    single = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0, 0.0]))
    found = orthogonalized(single)
    torch.testing.assert_close(found / found.norm(), single / single.norm())


def test_muon_steps_matrices_against_their_momentum_and_the_rest_as_adam():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 6))
    named = dict(model.named_parameters())
    before = {name: value.detach().double().clone() for name, value in named.items()}
    biases = {name: value.detach().clone().requires_grad_() for name, value in named.items()}
    optimizer, adam = Muon(named, weight_decay=0.1), AdamW(biases, weight_decay=0.1)
    momentum = {name: torch.zeros_like(value) for name, value in before.items()}
    gradients = {}
    for step, rate in enumerate((0.1, 0.05, 0.02)):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in named.items():
            gradients[name] = torch.randn(parameter.shape, generator=generator)
            parameter.grad, biases[name].grad = gradients[name].clone(), gradients[name].clone()
        if step == 2:  # as a checkpoint does
            optimizer = Muon(named, weight_decay=0.1, tensors=optimizer.tensors)
        optimizer.step(rate)
        adam.step(rate)
        for name in ("0.weight", "1.weight"):
            gradient = gradients[name].double()
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
            ahead = (0.05 * gradient + 0.95 * momentum[name]).flatten(1)
            change, _ = polynomials_of_singular_values(ahead)
            outputs, inputs = ahead.shape
            change *= rate * (outputs / inputs) ** 0.5
            before[name] = before[name] * (1 - rate * 0.1) - change.view_as(before[name])
            torch.testing.assert_close(named[name].double(), before[name], rtol=1e-4, atol=1e-5)
        for name in ("0.bias", "1.bias"):
            assert torch.equal(named[name], biases[name])


def test_one_step_of_muon_changes_outputs_as_much_at_every_width():
    changes = []
    for inputs, outputs in ((20, 400), (400, 400), (400, 20)):
        torch.manual_seed(0)
        layer = nn.Linear(inputs, outputs, bias=False)
        optimizer = Muon({"weight": layer.weight})
        x = torch.ones(1, inputs)
        before = layer(x).detach()
        (layer(x) * torch.randn(1, outputs)).sum().backward()
        optimizer.step(0.01)
        changes.append((layer(x) - before).square().mean().sqrt().item())
    assert changes == pytest.approx([0.0072] * 3, rel=0.01)  # 0.72: the polynomials of 1


def test_muon_takes_every_layers_weight_and_no_other_parameter():
    config = VAEConfig(
        data_shape=(1, 8, 8), space="grey8", latent_dim=3, likelihood="gaussian_shared",
        network="conv", hidden=(4,), posterior="flow", prior="vamp", prior_components=5,
    )  # fmt: skip
    model = VAE(config)
    layers = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    taken = {name for name, value in model.named_parameters() if is_weight_matrix(name, value)}
    assert taken == layers
    assert {name for name, value in model.named_parameters() if value.ndim > 1} > taken
