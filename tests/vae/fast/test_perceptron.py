"""The gradient by hand is autograd's, and it is taken where it is known."""

import pytest
import torch
from torch import Tensor, nn

from vae import acceleration
from vae.data import Dataset
from vae.fast import perceptron
from vae.models import VAE, NormalPrior, VAEConfig
from vae.objectives import ESTIMATORS, Objective, ObjectiveTerms, TrainingModule
from vae.training import TrainingConfig, fit

CONFIG = {
    "data_shape": (1, 6, 6),
    "space": "binary",
    "latent_dim": 3,
    "likelihood": "bernoulli",
    "hidden": (8, 7),
}


def model_of(dtype: torch.dtype, **changes) -> VAE:
    torch.manual_seed(0)
    model = VAE(VAEConfig(**CONFIG | changes)).to(dtype)
    model.set_data_statistics(torch.rand(1, 6, 6), torch.ones(1, 6, 6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def data_and_noise(model: VAE, num_samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2, (5, 1, 6, 6), generator=generator)
    eps = torch.randn((num_samples, 5, model.noise_dim), generator=generator)
    return x, eps.to(model.dtype)


def gradients_of(module: TrainingModule) -> list[Tensor]:
    gradients = [parameter.grad for parameter in module.parameters()]
    return [gradient.clone() for gradient in gradients if gradient is not None]


def terms_and_gradients(
    module: TrainingModule, x: Tensor, eps: Tensor
) -> tuple[ObjectiveTerms, list[Tensor]]:
    """With another weight for each example, so that none can stand in for another."""
    module.zero_grad()
    terms = module(x, eps, None, 0.7)
    (terms.surrogate * torch.arange(1.0, 1 + len(x))).sum().backward()
    return terms, gradients_of(module)


def decoder_both_ways(model: VAE, objective: Objective):
    x, eps = data_and_noise(model, objective.num_samples)
    module = TrainingModule(model, objective)
    found = terms_and_gradients(module, x, eps)
    with acceleration.allowed(False):
        return found, terms_and_gradients(module, x, eps)


def elbo_both_ways(model: VAE, num_samples: int):
    """Written out and by autograd, for the whole batch and for each example alone."""
    x, eps = data_and_noise(model, num_samples)
    module = TrainingModule(model, Objective(num_samples=num_samples))
    for own in (slice(None), *(slice(row, row + 1) for row in range(len(x)))):
        module.zero_grad()
        terms = module.manual_backward(x[own], eps[:, own], 0.7, 0.25)
        found = terms, gradients_of(module)
        module.zero_grad()
        with acceleration.allowed(False):
            expected = module(x[own], eps[:, own], None, 0.7)
        (expected.surrogate.sum() * -0.25).backward()
        yield found, (expected, gradients_of(module))


@pytest.mark.parametrize("activation", perceptron.ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(), (8,), (8, 7)])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_terms_and_gradients_are_autograds(activation, hidden, num_samples):
    model = model_of(torch.float64, activation=activation, hidden=hidden)
    assert perceptron.supports(model)
    for (terms, gradients), expected in elbo_both_ways(model, num_samples):
        torch.testing.assert_close(terms, expected[0], rtol=1e-12, atol=0)
        assert len(gradients) == len(list(model.parameters()))
        torch.testing.assert_close(gradients, expected[1], rtol=1e-11, atol=1e-12)


def test_a_gradient_that_is_there_is_written_over():
    model = model_of(torch.float64)
    x, eps = data_and_noise(model, 1)
    module = TrainingModule(model, Objective())
    module.manual_backward(x, eps, 1.0, 1.0)
    expected = gradients_of(module)
    module.manual_backward(1 - x, -eps, 0.5, 2.0)
    places = [parameter.grad for parameter in module.parameters()]
    assert not torch.equal(gradients_of(module)[0], expected[0])
    module.manual_backward(x, eps, 1.0, 1.0)
    assert all(one is two.grad for one, two in zip(places, module.parameters(), strict=True))
    torch.testing.assert_close(gradients_of(module), expected, rtol=0, atol=0)


def test_frozen_parameters_get_no_gradient():
    model = model_of(torch.float64)
    model.decoder.output.weight.requires_grad_(False)
    x, eps = data_and_noise(model, 1)
    TrainingModule(model, Objective()).manual_backward(x, eps, 1.0, 1.0)
    without = [name for name, value in model.named_parameters() if value.grad is None]
    assert without == ["decoder.output.weight"]


def test_training_takes_the_manual_backward_pass_and_ends_where_autograd_does(monkeypatch):
    data = Dataset(
        train=data_and_noise(model_of(torch.float32), 1)[0], valid=torch.ones(1, 1, 6, 6)
    )
    weights, manual = [], []
    elbo_and_gradient = perceptron.elbo_and_gradient
    monkeypatch.setattr(
        perceptron,
        "elbo_and_gradient",
        lambda *args, **options: manual.append(1) or elbo_and_gradient(*args, **options),
    )
    for supports in (perceptron.supports, lambda model: False):
        monkeypatch.setattr(perceptron, "supports", supports)
        model = model_of(torch.float64)
        config = TrainingConfig(epochs=3, batch_size=2, gradient_clip=5.0)
        list(fit(model, data, config, objective=Objective(num_samples=2, beta=0.5)))
        weights.append(list(model.parameters()))
    assert len(manual) == 9
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-10)


DECODERS = [{}, {"posterior": "full"}, {"prior": "vamp"}, {"latent_dim": (3, 2)}]


@pytest.mark.parametrize("changes", DECODERS)
@pytest.mark.parametrize("name", [*ESTIMATORS, "free bits"])
@pytest.mark.parametrize("samples_at_once", [1, 2, 3])
def test_of_decoders_too(changes, name, samples_at_once, monkeypatch):
    """Under any objective, posterior and prior, in parts or not."""
    monkeypatch.setattr(perceptron, "CACHED_VALUES", samples_at_once * 5 * 36)
    objective = (
        Objective(num_samples=3, free_bits=1.2)
        if name == "free bits"
        else Objective(name=name, num_samples=3)
    )
    model = model_of(torch.float64, **changes)
    asked, supports_decoder = [], perceptron.supports_decoder
    monkeypatch.setattr(
        perceptron, "supports_decoder", lambda model: asked.append(model) or supports_decoder(model)
    )
    (terms, gradients), expected = decoder_both_ways(model, objective)
    assert asked
    assert supports_decoder(model)
    torch.testing.assert_close(terms, expected[0], rtol=1e-11, atol=0)
    assert len(gradients) == len(expected[1])
    torch.testing.assert_close(gradients, expected[1], rtol=1e-10, atol=1e-11)


def test_float32_differs_by_rounding():
    model = model_of(torch.float32)
    for (terms, gradients), expected in elbo_both_ways(model, 2):
        torch.testing.assert_close(terms, expected[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(gradients, expected[1], rtol=2e-5, atol=2e-5)


def test_certain_and_wrong_pixels_keep_their_digits():
    """Where 1 - σ(logit) is 0 in float32."""
    model = model_of(torch.float32)
    with torch.no_grad():
        model.decoder.output.bias.add_(40 * torch.randn(36))
    for (terms, gradients), expected in elbo_both_ways(model, 1):
        assert terms.log_px_z.max() < -300
        torch.testing.assert_close(terms, expected[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(gradients, expected[1], rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "conv", "hidden": (4,)},
        {"activation": "gelu"},
        *DECODERS[1:],
        {"space": "grey8", "likelihood": "discretized_logistic"},
    ],
)
def test_other_models_are_autograds(changes):
    model = VAE(VAEConfig(**CONFIG | changes))
    assert not perceptron.supports(model)
    assert perceptron.supports_decoder(model) == (changes in DECODERS)


def test_bf16_is_autograds():
    model = model_of(torch.float32)
    with model.products_in("bf16"):
        assert model.precision == "bf16"
        assert not perceptron.supports(model)
    assert perceptron.supports(model)


class Carried(nn.Module):
    """What docs/extending.md puts in an encoder: affine layers that are not all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(36, 36)
        self.num_features = 36

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def carried(model: VAE) -> None:
    model.encoder.body = Carried()  # pyright: ignore[reportAttributeAccessIssue]
    model.encoder.output = nn.Linear(36, 6)


def without_bias(model: VAE) -> None:
    model.decoder.output = nn.Linear(7, 36, bias=False)


def other_activation(model: VAE) -> None:
    model.decoder.body[1] = nn.Sigmoid()


def dropped_out(model: VAE) -> None:
    model.encoder.body.append(nn.Dropout())  # pyright: ignore[reportCallIssue]


def other_prior(model: VAE) -> None:
    class Wide(NormalPrior):
        pass

    model.prior_family.__class__ = Wide  # pyright: ignore[reportAttributeAccessIssue]


def tied(model: VAE) -> None:
    model.decoder.output.bias = model.encoder.body[0].bias = nn.Parameter(torch.zeros(36))
    model.encoder.body[0].weight = nn.Parameter(torch.zeros(36, 36))
    model.encoder.body[2].weight = nn.Parameter(torch.zeros(7, 36))


def other_method(model: VAE) -> None:
    model.log_px_z = lambda x, z, u=None: z.sum(-1)


CHANGES = [carried, without_bias, other_activation, dropped_out, other_prior, tied, other_method]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_models_are_autograds(change):
    model = model_of(torch.float32)
    change(model)
    assert not perceptron.supports(model)
    of_encoder = change in (carried, dropped_out, other_prior, tied)
    assert perceptron.supports_decoder(model) == of_encoder


@pytest.mark.parametrize("part", ["decoder", "decoder.body.0", "decoder.output"])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_are_called(part, register):
    model, calls = model_of(torch.float32), []
    handle = getattr(model.get_submodule(part), register)(lambda *args: calls.append(args) or None)
    module = TrainingModule(model, Objective())
    assert not module.has_manual_backward(2)
    x, eps = torch.ones(2, 1, 6, 6), torch.zeros(1, 2, 3)
    module(x, eps).surrogate.sum().backward()
    assert len(calls) == 1
    handle.remove()
    assert perceptron.supports(model)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_are_called(register):
    model, calls = model_of(torch.float32), []
    module = TrainingModule(model, Objective())
    x, eps = torch.ones(2, 1, 6, 6), torch.zeros(1, 2, 3)
    handle = getattr(model.encoder.output.weight, register)(lambda *args: calls.append(args))
    assert not module.has_manual_backward(len(x))
    module(x, eps).surrogate.sum().backward()
    assert len(calls) == 1
    handle.remove()
    assert module.has_manual_backward(len(x))


def test_a_parameter_frozen_on_the_way_stays_as_it_is():
    model = model_of(torch.float32)
    data = Dataset(train=data_and_noise(model, 1)[0], valid=torch.ones(1, 1, 6, 6))
    weight = model.decoder.output.weight
    epochs = fit(model, data, TrainingConfig(epochs=2, batch_size=2))
    before = weight.clone()
    next(epochs)
    assert not torch.equal(weight, before)
    weight.requires_grad_(False)
    before, other = weight.clone(), model.encoder.output.weight.clone()
    next(epochs)
    assert torch.equal(weight, before)
    assert not torch.equal(model.encoder.output.weight, other)


def test_other_types_are_autograds():
    assert not perceptron.supports(model_of(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not perceptron.supports(model_of(torch.float32))


def test_the_gradient_of_data_and_noise_is_autograds():
    module = TrainingModule(model_of(torch.float32), Objective())
    x = torch.full((2, 1, 6, 6), 0.5, requires_grad=True)
    eps = torch.zeros(1, 2, 3, requires_grad=True)
    module(x, eps).surrogate.sum().backward()
    for leaf in (x, eps):
        assert leaf.grad is not None
        assert leaf.grad.any()


@pytest.mark.parametrize("shape", [(5, 36), (5, 6, 6), (5, 6, 6, 1), (5, 1, 6, 5)])
def test_data_of_another_shape_is_refused(shape):
    module = TrainingModule(model_of(torch.float32), Objective())
    for terms in (module, lambda x, eps: module.manual_backward(x, eps, 1.0, 1.0)):
        with pytest.raises(ValueError, match=r"x: expected shape \(B, 1, 6, 6\)"):
            terms(torch.ones(shape), torch.zeros(1, 5, 3))
        with pytest.raises(ValueError, match=r"eps: expected shape \(K, B, L\) = \(1, 5, 3\)"):
            terms(torch.ones(5, 1, 6, 6), torch.zeros(2, 5, 3))


def test_going_back_twice_is_refused():
    """The first time overwrites what the second would need."""
    model = model_of(torch.float64)
    terms = TrainingModule(model, Objective())(
        torch.ones(2, 1, 6, 6), torch.zeros(1, 2, 3, dtype=torch.float64)
    )
    terms.surrogate.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        terms.surrogate.sum().backward()
