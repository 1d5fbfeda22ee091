"""The registered model as others get it: loaded in a bare process, and behind a real server."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

from pipeline.evaluate import reference, score_split
from pipeline.register import (
    MOST_BYTES,
    MOST_VALUES,
    REQUIREMENTS,
    Registry,
    ScoredVAE,
    register,
    requirements,
    to_array,
)
from pipeline.stage import load_split
from pipeline.tracking import send
from tests.pipeline import builders
from tests.pipeline.servers import at_home, free_port, running
from vae.evidence import EvidenceSettings, example_generators, importance_sampling
from vae.models import VAE, VAEConfig, load, save
from vae.system import file_hash

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A registered model's files, downloaded, and the project that it came from beside them."""
    project = tmp_path_factory.mktemp("project")
    shutil.copy(empty_database, project / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch, at_home(project, patch):
        params = builders.params()
        result = register(params, builders.pipeline_outputs(project))
        registry = Registry(send.open_store(params), result["model_name"])
        registry.download(result["version"], project / "packed")
    return project / "packed"


@pytest.fixture(scope="module")
def served(packed: Path) -> Any:
    import mlflow.pyfunc

    before = list(sys.path)
    model = mlflow.pyfunc.load_model(str(packed))
    sys.path[:] = before
    return model


@pytest.fixture
def x(packed: Path) -> np.ndarray:
    return load_split(packed.parent / "data", "test").x


def test_it_loads_in_a_process_that_knows_nothing_of_the_project(
    packed: Path, tmp_path: Path, x: np.ndarray
) -> None:
    np.save(tmp_path / "x.npy", x[:3])
    script = (
        "import json, sys, numpy as np, mlflow.pyfunc\n"
        f"model = mlflow.pyfunc.load_model({str(packed)!r})\n"
        "table = model.predict(np.load('x.npy'), params={'seed': 3})\n"
        "known = sorted(n for n in sys.modules if n.partition('.')[0] in ('pipeline', 'ray'))\n"
        "print(json.dumps([sys.modules['vae'].__file__, known, table['log_px'].tolist()]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, known, log_px = json.loads(done.stdout)
    assert Path(where).is_relative_to(packed)
    assert known == []
    model, three = load(packed / "artifacts"), torch.tensor(x[:3])
    expected = importance_sampling(model, three, 50, generator=example_generators(three, 3))
    np.testing.assert_allclose(log_px, expected.log_px.numpy(), rtol=1e-6)
    assert done.stderr == ""


def test_no_pickle_travels_with_it(packed: Path) -> None:
    suffixes = {path.suffix for path in packed.rglob("*") if path.is_file()}
    assert suffixes <= {"", ".py", ".json", ".yaml", ".txt", ".safetensors"}
    (packed / "artifacts" / "weights.safetensors").stat()


def test_its_requirements_are_pinned_and_all_that_it_imports(packed: Path) -> None:
    listed = (packed / "requirements.txt").read_text().split()
    assert listed == requirements()
    assert all("==" in line and "+" not in line for line in listed)
    imported = set()
    for path in [*(packed / "code").rglob("*.py"), packed / "served_model.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"vae"}
    assert foreign <= {name.replace("-", "_") for name in REQUIREMENTS}


def test_it_imports_nothing_by_name_and_starts_nothing(packed: Path) -> None:
    """So no request, whatever it names, makes the server run code; `data.source` stays at home."""
    code = [*(packed / "code").rglob("*.py"), packed / "served_model.py"]
    words = {node.id for path in code for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Name)}  # fmt: skip
    assert not words & {"importlib", "pickle", "subprocess", "eval", "exec", "__import__"}
    assert not [path for path in code if "sources" in path.parts]


@pytest.mark.parametrize("fault", ["one bit", "a pickle", "a pickle with its own hash"])
def test_weights_that_are_not_the_registered_are_refused(
    packed: Path, tmp_path: Path, fault: str
) -> None:
    import mlflow.pyfunc

    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    shutil.copytree(packed, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "artifacts" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content if fault == "one bit" else pickle.dumps(Planted()))
    if fault == "a pickle with its own hash":
        config = weights.with_name("config.json")
        facts = json.loads(config.read_text()) | {"weights_sha256": file_hash(weights)}
        config.write_text(json.dumps(facts))
    before = list(sys.path)
    said = "not a safetensors file" if "hash" in fault else "is damaged or was changed: its SHA-256"
    with pytest.raises(Exception, match=said):
        mlflow.pyfunc.load_model(str(tmp_path / "damaged"))
    sys.path[:] = before
    assert not (tmp_path / "ran").exists()


def test_the_signature_tells_shape_and_parameters(served: Any) -> None:
    signature = served.metadata.signature
    assert signature.inputs.inputs[0].shape == (-1, *builders.SHAPE)
    assert [spec.name for spec in signature.params.params] == ["task", "num_samples", "seed"]
    names = ["log_px", "se", "ess", "khat", "bits_per_dim", "percentile", "reason"]
    assert signature.outputs.input_names() == names
    example = served.input_example
    assert served.predict(example).columns.tolist() == names


def test_scores_are_those_of_importance_sampling(served: Any, packed: Path, x: np.ndarray) -> None:
    table = served.predict(x, params={"task": "score", "num_samples": 30, "seed": 1})
    generators = example_generators(torch.tensor(x), 1)
    model = load(packed / "artifacts")
    expected = importance_sampling(model, torch.tensor(x), 30, generator=generators)
    for name in ("log_px", "se", "ess", "khat"):
        np.testing.assert_allclose(table[name], getattr(expected, name).numpy(), rtol=1e-6)
    np.testing.assert_allclose(table["bits_per_dim"], -table["log_px"] / (16 * np.log(2)))


def test_an_examples_score_does_not_depend_on_those_beside_it(served: Any, x: np.ndarray) -> None:
    table = served.predict(x)
    alone = pd.concat([served.predict(x[[n]]) for n in (3, 17)], ignore_index=True)
    assert_same_scores(alone, table.iloc[[3, 17]].reset_index(drop=True))
    other = served.predict(x, params={"seed": 1})["log_px"]
    assert (other != table["log_px"]).all()
    assert np.abs(other - table["log_px"]).mean() < 5 * table["se"].mean()


def test_percentiles_count_the_validation_split(served: Any, packed: Path) -> None:
    """The validation split scored as for the reference: its percentiles are uniform."""
    valid = load_split(packed.parent / "data", "valid").x
    table = served.predict(valid)
    ranks = table["log_px"].rank() - 1
    np.testing.assert_allclose(table["percentile"], 100 * ranks / (len(valid) - 1), atol=1.0)
    assert table["percentile"].max() == 100
    assert table["percentile"].min() == 0


def test_the_evaluations_own_examples_get_its_own_scores(served: Any, packed: Path) -> None:
    test = load_split(packed.parent / "data", "test").x
    stored = pd.read_parquet(packed.parent / "evaluate" / "per_example.parquet")
    np.testing.assert_allclose(served.predict(test)["log_px"], stored["log_px"], rtol=1e-6)


def test_a_twentieth_of_fresh_data_lies_below_the_fifth_percentile(tmp_path: Path) -> None:
    """Reference and fresh data from one source; both samples count in the binomial tolerance."""
    model = direct(tmp_path / "m", latent_dim=1)
    fresh, valid = 1500, 1000
    x = model.predict(None, np.zeros(1), {"task": "sample", "num_samples": fresh + valid})
    log_px = model.predict(None, x)["log_px"].to_numpy()
    probabilities = np.linspace(0, 1, 101)
    model.reference_log_px = np.quantile(log_px[:valid], probabilities)
    model.reference_percent = 100 * probabilities
    percentile = model.predict(None, x[valid:])["percentile"]
    for limit in (5, 50, 95):
        share = limit / 100
        tolerance = 3 * np.sqrt(share * (1 - share) * (1 / fresh + 1 / valid))
        assert (percentile < limit).mean() == pytest.approx(share, abs=tolerance)


def assert_same_scores(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """But for rounding, which differs with where in memory a product's factors lie.

    khat is a fit to the few largest weights and magnifies it.
    """
    pd.testing.assert_frame_equal(found, expected, rtol=1e-2)
    np.testing.assert_allclose(found["log_px"], expected["log_px"], rtol=1e-6)


@pytest.mark.parametrize("form", ["uint8", "int64", "float32", "flat", "list", "frame", "pixels"])
def test_any_form_of_the_same_examples_scores_the_same(
    served: Any, x: np.ndarray, form: str
) -> None:
    forms: dict[str, Any] = {
        "uint8": x,
        "int64": x.astype(np.int64),
        "float32": x.astype(np.float32),
        "flat": x.reshape(len(x), -1),
        "list": x.tolist(),
        "frame": pd.DataFrame(x.reshape(len(x), -1)),
        "pixels": x[:, 0],
    }
    assert_same_scores(served.predict(forms[form]), served.predict(x))


def test_one_example_may_come_alone(served: Any, x: np.ndarray) -> None:
    expected = served.predict(x[:1])
    for alone in (x[0], x[0, 0], x[0].reshape(-1)):
        assert_same_scores(served.predict(alone), expected)


def test_encode_decode_and_reconstruct_are_the_models(
    served: Any, packed: Path, x: np.ndarray
) -> None:
    model = load(packed / "artifacts")
    with torch.no_grad():
        q = model.posterior(torch.tensor(x))
        expected = model.likelihood(q.mean).mean.numpy()
    encoded = served.predict(x, params={"task": "encode"})
    np.testing.assert_allclose(encoded["mean"], q.mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(encoded["std"] ** 2, q.variance.detach().numpy(), rtol=1e-5)
    decoded = served.predict(encoded["mean"], params={"task": "decode"})
    np.testing.assert_allclose(decoded, expected, rtol=1e-5)
    again = served.predict(x, params={"task": "reconstruct"})
    np.testing.assert_allclose(again, expected, rtol=1e-5)


def test_samples_are_seeded_grey_images_with_the_models_mean(served: Any, packed: Path) -> None:
    def draw(**params: int) -> np.ndarray:
        return served.predict(np.zeros((1, *builders.SHAPE)), params={"task": "sample"} | params)

    assert draw().shape == (16, *builders.SHAPE)
    many = draw(num_samples=4000, seed=7)
    np.testing.assert_array_equal(many, draw(num_samples=4000, seed=7))
    assert (many != draw(num_samples=4000, seed=8)).any()
    assert set(np.unique(many)) <= set(range(256))
    model = load(packed / "artifacts")
    with torch.no_grad():
        z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
        expected = model.likelihood(z).mean.mean(0).numpy()
    error = many.std(0) / np.sqrt(2000)
    assert (np.abs(many.mean(0) - expected) < 5 * error).all()


def direct(folder: Path, columns: list[str] | None = None, **changes: Any) -> Any:
    """The pyfunc around any model, as MLflow sets it up."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"data_shape": (3,), "space": "continuous", "latent_dim": 2}
    config = VAEConfig(**defaults | {"likelihood": "gaussian", "hidden": (8,)} | changes)
    save(VAE(config), folder)
    reference = {"log_px": [-9.0, -5.0], "probabilities": [0.0, 1.0], "num_samples": 20}
    builders.write_json(folder / "reference.json", reference)
    builders.write_json(folder / "data.json", {"columns": columns})
    model = ScoredVAE()
    weights = str(folder / "weights.safetensors")
    model.load_context(SimpleNamespace(artifacts={"weights": weights}))
    return model


@pytest.mark.parametrize("posterior", ["diagonal", "full", "flow"])
@pytest.mark.parametrize("latent_dim", [2, (3, 2)])
def test_every_posterior_encodes_to_its_moments(
    tmp_path: Path, posterior: str, latent_dim: Any
) -> None:
    model = direct(tmp_path / "m", posterior=posterior, latent_dim=latent_dim)
    x = np.random.default_rng(0).normal(size=(4, 3))
    found = model.predict(None, x, {"task": "encode"})
    with torch.no_grad():
        z = model.model.posterior(torch.tensor(x)).sample((4000,)).double()
    error = (z.std(0) / np.sqrt(4000)).numpy()
    assert (np.abs(found["mean"] - z.mean(0).numpy()) < 12 * error).all()
    np.testing.assert_allclose(found["std"], z.std(0).numpy(), rtol=0.2)
    assert model.predict(None, found["mean"], {"task": "decode"}).shape == x.shape


def test_a_table_is_scored_by_frame_and_array_without_bits(tmp_path: Path) -> None:
    model = direct(tmp_path / "m")
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 3)), columns=["a", "b", "c"])
    scores = model.predict(None, table)
    assert scores.columns.tolist() == ["log_px", "se", "ess", "khat", "percentile", "reason"]
    assert_same_scores(scores, model.predict(None, table.to_numpy()))
    expected = 100 * np.clip((scores["log_px"] + 9) / 4, 0, 1)
    np.testing.assert_allclose(scores["percentile"], expected)
    with pytest.raises(MlflowException, match=r"expected x of shape .B, 3.; found .5, 2."):
        model.predict(None, table[["a", "b"]])


def test_a_tables_columns_are_found_by_name(tmp_path: Path) -> None:
    model = direct(tmp_path / "m", columns=["a", "b", "c"])
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 3)), columns=["a", "b", "c"])
    scores = model.predict(None, table)
    mixed = table[["c", "a", "b"]].assign(id="x")
    assert_same_scores(scores, model.predict(None, mixed))
    unnamed = pd.DataFrame(table.to_numpy())
    assert_same_scores(scores, model.predict(None, unnamed))
    with pytest.raises(MlflowException, match="the columns b are missing; expected a, b, c; found"):
        model.predict(None, table.rename(columns={"b": "bb"}))
    with pytest.raises(MlflowException, match="expected each column once"):
        model.predict(None, table[["a", "b", "c", "a"]])


def test_binary_data_takes_zero_and_one_only(tmp_path: Path) -> None:
    model = direct(tmp_path / "m", data_shape=(1, 2, 2), space="binary", likelihood="bernoulli")
    assert len(model.predict(None, np.array([[0, 1, 1, 0]]))) == 1
    with pytest.raises(MlflowException, match="expected 0 or 1; found values from 0 to 255"):
        model.predict(None, np.array([[0, 255, 255, 0]]))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("x", {"task": "scores"}, "unknown task 'scores'; known: score, encode"),
    ("x", {"num_sample": 3}, "unknown parameter num_sample; known: task, num_samples, seed"),
    ("x", {"num_samples": 0}, "num_samples is 0; expected a whole number from 1"),
    ("x", {"num_samples": 2.5}, "num_samples is 2.5; expected a whole number"),
    ("x", {"num_samples": 10**9}, "expected a whole number from 1 to 100000"),
    ("x", {"seed": -1}, "seed is -1"),
    ("wide", {}, r"expected x of shape (B, 1, 4, 4); found (2, 1, 4, 5)"),
    ("empty", {}, "with B at least 1; found none"),
    ("nan", {}, "expected finite numbers; 1 of 16 are NaN or infinite"),
    ("unit", {}, "expected whole grey levels 0…255, not rescaled; found values from 0.5 to 0.5"),
    ("bright", {}, "not rescaled; found values from 256 to 256"),
    ("x", {"task": "decode"}, "decode takes z of shape (B, 2)"),
    ("many", {"num_samples": 100_000}, "30 examples with 100,000 samples each are more than a"),
    (
        "x",
        {"task": "sample", "num_samples": 100_000, "seed": 2**64},
        "seed is 18446744073709551616",
    ),
]


def bad_input(name: str, x: np.ndarray) -> np.ndarray:
    nan = np.zeros((1, *builders.SHAPE))
    nan[0, 0, 1, 2] = np.nan
    return {
        "x": x[:1],
        "wide": np.zeros((2, 1, 4, 5)),
        "empty": x[:0],
        "nan": nan,
        "unit": np.full((1, *builders.SHAPE), 0.5),
        "bright": np.full((1, *builders.SHAPE), 256),
        "many": x[:30],
    }[name]


@pytest.mark.parametrize(("data", "params", "sentence"), BAD)
def test_bad_requests_are_refused_in_a_sentence(
    served: Any, x: np.ndarray, data: str, params: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(MlflowException) as caught:
        served.predict(bad_input(data, x), params=params)
    assert sentence in caught.value.message
    assert caught.value.get_http_status_code() == 400


def test_text_and_ragged_rows_are_refused(served: Any) -> None:
    for data in ([["a"] * 16], [["1"] * 16], [[1.0] * 16, [1.0]], np.full((1, 16), 1j)):
        with pytest.raises(MlflowException, match="numbers in rows of equal length"):
            served.predict(data)


def test_more_values_than_a_call_may_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MlflowException, match="at most 16,777,216 values in one call; found"):
        to_array(np.broadcast_to(np.float32(0), (MOST_VALUES + 1,)))
    model = direct(tmp_path / "m", data_shape=(200,))
    with pytest.raises(MlflowException, match="values in one call; asked for 20,000,000"):
        model.predict(None, np.zeros(1), {"task": "sample", "num_samples": 100_000})


def test_another_model_in_the_process_keeps_mlflows_own_checks(served: Any) -> None:
    import mlflow.pyfunc
    from mlflow.types import ParamSchema, ParamSpec

    schema = ParamSchema([ParamSpec("other", "long", 1)])
    checked = mlflow.pyfunc._validate_prediction_input([1], {"wrong": 2}, None, schema)  # pyright: ignore
    assert checked == ([1], {"other": 1})


@pytest.fixture(scope="module")
def address(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow models serve` of the registered model."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(packed)]
    command += ["--env-manager", "local", "--port", str(port), "--host", "127.0.0.1"]
    with running(command, tmp_path_factory.mktemp("serve"), port):
        yield f"http://127.0.0.1:{port}/invocations"


def ask(address: str, body: Any) -> tuple[int, str]:
    data = body.encode() if isinstance(body, str) else body
    if isinstance(body, dict):
        data = json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_parallel_requests_are_answered_as_alone(
    address: str, served: Any, x: np.ndarray
) -> None:
    with ThreadPoolExecutor(20) as pool:
        bodies = [{"inputs": x[[n % len(x)]].tolist()} for n in range(100)]
        answers = list(pool.map(lambda body: ask(address, body), bodies))
    for n, (status, text) in enumerate(answers):
        assert status == 200, text
        (row,) = strict_json(text)["predictions"]
        expected = served.predict(x[[n % len(x)]])["log_px"][0]
        assert row["log_px"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_task_is_served(address: str, served: Any, x: np.ndarray) -> None:
    def tell(data: np.ndarray, **params: Any) -> Any:
        status, text = ask(address, {"inputs": data.tolist(), "params": params})
        assert status == 200, text
        return strict_json(text)["predictions"]

    encoded = tell(x[:2], task="encode")
    expected = served.predict(x[:2], params={"task": "encode"})
    np.testing.assert_allclose(encoded["mean"], expected["mean"], rtol=1e-5)
    decoded = tell(np.array(encoded["mean"]), task="decode")
    np.testing.assert_allclose(decoded, tell(x[:2], task="reconstruct"), rtol=1e-4)
    drawn = tell(x[:1], task="sample", num_samples=3, seed=5)
    params = {"task": "sample", "num_samples": 3, "seed": 5}
    np.testing.assert_array_equal(drawn, served.predict(x[:1], params=params))
    np.testing.assert_array_equal(drawn, tell(np.empty(0), task="sample", num_samples=3, seed=5))
    frame = {"columns": list(range(16)), "data": x[:2].reshape(2, -1).tolist()}
    status, text = ask(address, {"dataframe_split": frame})
    assert status == 200, text
    framed = [row["log_px"] for row in strict_json(text)["predictions"]]
    np.testing.assert_allclose(framed, served.predict(x[:2])["log_px"], rtol=1e-6)
    (row,) = tell(x[:1], num_samples=1)
    assert (row["se"], row["khat"]) == (None, None)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bad_requests_get_a_400_and_the_server_lives_on(address: str, x: np.ndarray) -> None:
    for data, params, sentence in BAD:
        if data == "empty":  # [] as JSON has lost its shape
            continue
        body = json.dumps({"inputs": bad_input(data, x).tolist(), "params": params})
        status, text = ask(address, body)
        assert status == 400, (data, params, text)
        assert sentence in json.loads(text)["message"]
    for body in ("{", "[1]", '{"inputs": [[1], [1, 2]]}', '{"inputs": "text"}', '{"inputs": []}'):
        assert ask(address, body)[0] == 400, body
    assert ask(address, {"inputs": x[:1].tolist(), "params": [1]})[0] == 400
    status, text = ask(address, "[" * 200_000)
    assert (status, "found lists in lists" in text) == (400, True)
    assert ask(address, {"inputs": x[:1].tolist()})[0] == 200


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_body_beyond_the_bound_gets_a_400_and_the_server_lives_on(
    address: str, x: np.ndarray
) -> None:
    body = json.dumps({"inputs": x[:1].tolist()}).encode()
    assert ask(address, body.ljust(MOST_BYTES))[0] == 200
    sentence = f"expected a body of at most {MOST_BYTES:,} bytes; found {MOST_BYTES + 1:,}"
    for told in (body.ljust(MOST_BYTES + 1), (body, b" " * (MOST_BYTES + 1 - len(body)))):
        status, text = ask(address, told)  # the second in chunks, of no length known beforehand
        assert (status, json.loads(text)["message"]) == (400, sentence)
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda n: ask(address, b"1" * n * MOST_BYTES)[0], [3, 4, 5, 6]))
    assert statuses == [400] * 4
    assert ask(address, body)[0] == 200


REAL = ["gaussian", "gaussian_shared", "gaussian_unit", "student_t", "laplace"]


@pytest.mark.parametrize("likelihood", REAL)
@pytest.mark.parametrize("proposal", ["encoder", "laplace", "refined"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_an_outlier_costs_its_neighbours_nothing(
    tmp_path: Path, likelihood: str, proposal: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets figures or a reason; the answer is JSON; the others' figures are their own."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    model = direct(tmp_path / "m", likelihood=likelihood, activation=activation, hidden=(4,))
    model.proposal = proposal
    x = np.random.default_rng(0).normal(size=(9, 3))
    alone = model.predict(None, x, {"num_samples": 50})
    for row, value in enumerate([1e5, 1e9, 1e20, -1e99, 1e101, 1e300, np.inf, np.nan]):
        x[row, 1] = value
    found = model.predict(None, x, {"num_samples": 50})
    json.dumps(found.to_dict("records"), allow_nan=False)
    assert found.loc[8].to_dict() == alone.loc[8].to_dict()
    for row in found.to_dict("records"):
        assert (row["log_px"] is None) == (row["reason"] is not None)
    assert found["reason"][4:8].tolist() == [
        "x[1] is 1e+101, beyond 1e+100", "x[1] is 1e+300, beyond 1e+100",
        "x[1] is inf, beyond 1e+100", "x[1] is missing",
    ]  # fmt: skip


def test_what_has_no_word_in_json_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = direct(tmp_path / "m")
    x = np.zeros((3, 3))
    x[1, 0] = np.nan
    for task in ("encode", "reconstruct"):
        with pytest.raises(MlflowException, match=r"1 of 9 are NaN or infinite, the first in exam"):
            model.predict(None, x, {"task": task})
    with pytest.raises(MlflowException, match="the first in example 0"):
        model.predict(None, np.array([[np.inf, 0.0]]), {"task": "decode"})


def test_true_and_false_and_pictures_of_0_and_1_are_refused(tmp_path: Path) -> None:
    """`prepare` refuses them in tables, and takes true for grey level 255."""
    with pytest.raises(MlflowException, match="expected numbers; found true and false"):
        direct(tmp_path / "t").predict(None, np.array([[True, False, True]]))
    grey = direct(
        tmp_path / "g", data_shape=(1, 2, 2), space="grey8", likelihood="discretized_logistic"
    )
    with pytest.raises(MlflowException, match="found only 0 and 1: black and white are 0 and 255"):
        grey.predict(None, np.array([[0.0, 1.0, 1.0, 0.0]]))
    assert len(grey.predict(None, np.array([[0, 1, 255, 0], [0, 1, 0, 0]]))) == 2


@pytest.mark.parametrize(
    "settings",
    [
        EvidenceSettings(num_samples=60, seed=5),
        EvidenceSettings(num_samples=600, seed=2, proposal="refined", target_se=0.05),
        EvidenceSettings(num_samples=300, seed=1, target_se=0.2, precision="bf16"),
    ],
)
def test_the_quantiles_are_of_the_estimates_that_are_served(
    tmp_path: Path, settings: EvidenceSettings
) -> None:
    """To the bit: asked for nothing else, it scores as the evaluation did."""
    model = direct(tmp_path / "m")
    x = np.random.default_rng(0).normal(size=(40, 3))
    made = score_split(model.model, torch.from_numpy(x), settings)
    reference_json = tmp_path / "m" / "reference.json"
    reference_json.write_text(json.dumps(reference(made) | settings.to_dict()))
    model.load_context(
        SimpleNamespace(artifacts={"weights": str(tmp_path / "m" / "weights.safetensors")})
    )
    found = model.predict(None, x)
    np.testing.assert_array_equal(found["log_px"], made.log_px)
    expected = 100 * (np.argsort(np.argsort(made.log_px)) / 39)
    np.testing.assert_allclose(found["percentile"], expected, atol=1.5)
