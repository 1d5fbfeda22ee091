"""params.yaml at the door: the shipped file loads, and each wrong one is told to a person."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from pipeline.params import DataParams, EvaluateParams, SweepParams, load_params
from pipeline.stage import UserError

SHIPPED = Path(__file__).parents[3] / "params.yaml"


def faults_of(text: str | bytes, tmp_path: Path) -> str:
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_params(path)
    return str(caught.value).replace(str(path), "params.yaml")


# On these the messages depend; the shipped file's own values are for its user to change.
LIKELIHOODS = ["gaussian", "gaussian_shared", "continuous_bernoulli", "discretized_logistic"]
SETTLED: dict[str, dict[str, Any]] = {
    "data": {"space": "grey8"},
    "model": {"latent_dim": None, "likelihood": None, "network": "mlp"},
    "sweep": {"likelihood": LIKELIHOODS},
    "register": {"promote": None},
}


def changed(**sections: dict[str, Any]) -> str:
    content = yaml.safe_load(SHIPPED.read_text())
    for changes in (SETTLED, sections):
        for name, values in changes.items():
            content[name] |= values
    return yaml.safe_dump(content, sort_keys=False)


def spelt(key: str, text: str) -> str:
    """The file with one key's value spelt as `text`."""
    content, count = re.subn(rf"^  {key}: .*$", f"  {key}: {text}", changed(), flags=re.MULTILINE)
    assert count == 1
    return content


def test_shipped_file_loads_with_its_values():
    values = json.loads(json.dumps(asdict(load_params(SHIPPED))))
    assert values == yaml.safe_load(SHIPPED.read_text())


def test_each_knob_of_the_shipped_file_has_a_comment():
    bare = [
        line
        for line in SHIPPED.read_text().splitlines()
        if line.strip() and "#" not in line and not line.rstrip().endswith(":")
    ]
    assert bare == []


# One change to the shipped file: section, key, value, what the message must say.
WRONG_VALUES = [
    ("data", "source", 5, "data.source: expected text, got 5"),
    ("data", "source", "", "data.source: expected text, got ''"),
    ("data", "root", None, "data.root: expected text, got null"),
    ("data", "root", "data", "data.root: 'data' meets data/prepared, which stages write"),
    ("data", "root", "./models/x", "meets models, which stages write"),
    ("data", "root", ".", "meets data/prepared, which stages write"),
    ("data", "source", "mnist", "'mnist' is no data source; did you mean mnist5k?, or your module"),
    ("data", "source", "s3://bucket", "'s3://bucket' is no data source"),
    ("data", "source", "torchvision", "'torchvision' is no data source"),
    ("data", "source", "mnist5k:train", "mnist5k takes nothing after its name"),
    ("data", "source", "my data:load", "'my data:load' is no data source"),
    (
        "data",
        "size",
        0,
        "expected a whole number at least 1 and at most 1024, or a list",
    ),
    ("data", "size", [28], "expected a whole number at least 1 and at most 1024, or a list of 2 ("),
    ("data", "size", [28, 28, 3], "got [28, 28, 3]"),
    ("data", "size", 100_000, "got 100000"),
    ("data", "size", 32, "data.size: source mnist5k does not read it; set it to null"),
    ("data", "channels", 2, "data.channels: expected 1 | 3, or null, got 2"),
    ("data", "channels", 3, "data.channels: source mnist5k does not read it"),
    ("data", "columns", "age", "data.columns: expected a list of one or more"),
    ("data", "columns", [], "data.columns: expected a list of one or more"),
    ("data", "columns", ["age"], "data.columns: source mnist5k does not read it"),
    ("data", "missing", "zero", "data.missing: expected refuse | mean | median, got 'zero'"),
    ("data", "missing", "mean", "source mnist5k does not read it; set it to refuse"),
    ("data", "id", 3, "data.id: expected text, or null, got 3"),
    ("data", "id", "name", "data.id: source mnist5k does not read it"),
    ("data", "label", "kind", "data.label: source mnist5k does not read it"),
    ("data", "group", ["a"], "data.group: expected text, or null, got ['a']"),
    ("data", "space", "gray8", "got 'gray8'; did you mean grey8?"),
    ("data", "space", ["grey8"], "expected binary | grey8 | continuous, got ['grey8']"),
    ("data", "binarization", "dinamic", "did you mean dynamic?"),
    ("data", "valid_fraction", 0, "expected a number above 0 and below 1, got 0"),
    ("data", "valid_fraction", 1.0, "data.valid_fraction: expected a number above 0 and below 1"),
    ("data", "valid_fraction", "0.1", "got '0.1'"),
    ("data", "test_fraction", float("nan"), "data.test_fraction: expected a number"),
    ("data", "test_fraction", float("inf"), "data.test_fraction: expected a number"),
    ("data", "test_fraction", -0.2, "got -0.2"),
    ("data", "seed", -1, "expected a whole number at least 0 and at most 2147483647, got -1"),
    ("data", "seed", 2**31, "data.seed: expected a whole number"),
    ("data", "seed", True, "data.seed: expected a whole number"),
    ("data", "limit", 9, "expected a whole number at least 10, or null, got 9"),
    ("data", "limit", 10**30, "which is too large"),
    ("model", "latent_dim", 0, "model.latent_dim: expected a whole number at least 1"),
    ("model", "latent_dim", "3", "got '3'"),
    ("model", "latent_dim", 2.5, "got 2.5"),
    ("model", "latent_dim", [], "got []"),
    ("model", "latent_dim", [100, 0], "got [100, 0]"),
    ("model", "latent_dim", 10**6, "at most 65536"),
    (
        "model",
        "likelihood",
        "gausian",
        "model.likelihood: 'gausian' is unknown; did you mean gauss",
    ),
    ("model", "likelihood", "bernoulli", "grey8"),
    ("model", "network", "cnn", "model.network: 'cnn' is unknown"),
    ("model", "hidden", 200, "model.hidden: expected a list"),
    ("model", "hidden", [200, -1], "got [200, -1]"),
    ("model", "hidden", ["200"], "got ['200']"),
    ("model", "activation", "relo", "did you mean relu?"),
    ("model", "posterior", "diagnal", "did you mean diagonal?"),
    ("model", "prior", "norml", "did you mean normal?"),
    ("model", "min_scale", 0, "model.min_scale: expected a number above 0"),
    ("model", "min_scale", 2, "model.min_scale: expected a number between 0 and 1"),
    ("model", "num_components", 0, "model.num_components: expected a whole number at least 1"),
    ("model", "prior_components", None, "got null"),
    ("objective", "name", "eblo", "did you mean elbo?"),
    ("objective", "num_samples", 0, "objective.num_samples"),
    ("objective", "num_samples", 1.0, "objective.num_samples: expected a whole number, got 1.0"),
    ("objective", "beta", -1, "objective.beta"),
    ("objective", "beta", False, "objective.beta: expected a number, got false"),
    ("objective", "beta_warmup_epochs", -3, "objective.beta_warmup_epochs"),
    ("objective", "free_bits", float("-inf"), "objective.free_bits"),
    ("objective", "reduction", "avg", "objective.reduction"),
    ("sweep", "latent_dim", [], "a list of one or more"),
    ("sweep", "latent_dim", 4, "sweep.latent_dim: expected a list"),
    ("sweep", "latent_dim", [4, 4], "expected each value once, got [4, 4]"),
    ("sweep", "likelihood", "gaussian", "sweep.likelihood: expected a list"),
    ("sweep", "likelihood", ["gaussian", "bernoulli"], "sweep.likelihood"),
    ("sweep", "likelihood", ["laplas"], "did you mean laplace?"),
    ("sweep", "search", "bayes", "sweep.search: expected grid | random | optuna, got 'bayes'"),
    ("sweep", "num_trials", 0, "sweep.num_trials: expected a whole number at least 1, got 0"),
    ("sweep", "num_seeds", 0, "sweep.num_seeds: expected a whole number at least 1, got 0"),
    ("sweep", "latent_dim", {"integer": [2, 8]}, "sweep.latent_dim: grid needs a list of values"),
    ("sweep", "space", [], "sweep.space: expected a mapping, got []"),
    (
        "sweep",
        "space",
        {"objective.beta": [-1]},
        "objective.beta -1: expected a number of at least",
    ),
    ("sweep", "epochs", 0, "sweep.epochs: expected a whole number at least 1, got 0"),
    ("sweep", "num_importance_samples", -1, "sweep.num_importance_samples"),
    ("sweep", "scheduler", "ASHA", "got 'ASHA'"),
    ("sweep", "max_concurrent", 0, "expected a whole number at least 1, or null"),
    ("training", "epochs", 0, "training.epochs"),
    ("training", "batch_size", "all", "training.batch_size: expected a whole number, got 'all'"),
    ("training", "optimizer", "moun", "training.optimizer"),
    ("training", "learning_rate", 0, "training.learning_rate"),
    ("training", "schedule", "cosin", "training.schedule"),
    ("training", "weight_decay", -0.1, "training.weight_decay"),
    ("training", "gradient_clip", 0, "training.gradient_clip"),
    ("training", "patience", 0, "training.patience"),
    ("training", "seed", None, "training.seed: expected a whole number, got null"),
    ("scaling", "workers_per_trial", 0, "scaling.workers_per_trial: expected a whole number"),
    ("scaling", "gpus_per_trial", 0, "expected a number above 0 and at most 1, got 0"),
    ("scaling", "gpus_per_trial", 2, "expected a number above 0 and at most 1, got 2"),
    ("scaling", "num_workers", 0, "scaling.num_workers"),
    ("scaling", "min_workers", 0, "scaling.min_workers: expected a whole number at least 1"),
    ("scaling", "min_workers", 5000, "min_workers: expected at most num_workers, "),
    ("training", "memory_limit_mb", 0, "training.memory_limit_mb: expected at least 1, or null"),
    ("training", "memory_limit_mb", 0.5, "training.memory_limit_mb: expected a whole number"),
    ("scaling", "use_gpu", 1, "scaling.use_gpu: expected true or false, got 1"),
    ("scaling", "use_gpu", "yes", "got 'yes'"),
    ("scaling", "max_failures", -1, "scaling.max_failures"),
    ("scaling", "storage", "", "scaling.storage"),
    ("submit", "folder", "shared/repo", "expected an absolute path on the cluster, got 'shared/"),
    ("submit", "remote", "", "submit.remote"),
    ("submit", "python", 3, "submit.python"),
    ("submit", "forward", ["A=1"], "expected names of environment variables, got 'A=1'"),
    ("submit", "forward", "A", "submit.forward"),
    ("scaling", "storage", "gs://b/x", "storage: expected a path or s3://bucket/prefix, got 'gs:"),
    ("scaling", "storage", "s3://", "storage: expected a path or s3://bucket/prefix"),
    ("scaling", "storage", "s3://b?endpoint_override=x", "storage: expected a path or s3://"),
    ("evaluate", "num_importance_samples", 0, "evaluate.num_importance_samples"),
    ("evaluate", "target_se", 0, "evaluate.target_se"),
    ("evaluate", "proposal", "encodr", "did you mean encoder?"),
    ("register", "promote", "maybe", "expected true or false, or null, got 'maybe'"),
    ("tracking", "experiment", "", "tracking.experiment"),
    ("tracking", "uri", 3, "tracking.uri: expected text, or null, got 3"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), WRONG_VALUES)
def test_a_wrong_value_is_named_with_key_value_and_what_is_allowed(
    section: str, key: str, value: object, message: str, tmp_path: Path
):
    found = faults_of(changed(**{section: {key: value}}), tmp_path)
    assert found.startswith("params.yaml has 1 fault:\n  line ")
    assert f"{section}.{key}: " in found
    assert message in found


# Whole files that are wrong before any value is.
WRONG_FILES = [
    (b"", "params.yaml is empty"),
    (b"# nothing\n", "params.yaml is empty"),
    (b"- data\n- model\n", "expected sections such as `data:`"),
    (b"just text\n", "expected sections such as `data:`"),
    (b"42\n", "expected sections such as `data:`"),
    (b"\x89PNG\r\n\x1a\n\x00\x00\x00", "not text in UTF-8 (line 1"),
    (b"data: \x00\x01\n", "params.yaml is not valid YAML"),
    ("data: gr\u00fcn\n".encode("latin-1"), "not text in UTF-8 (line 1"),
    (b"data:\n\tsource: mnist5k\n", "line 2 holds a tab; use spaces"),
    (b"data: {source: mnist5k\n", "not valid YAML: line"),
    (b"data: [1, 2\nmodel: 3\n", "not valid YAML: line"),
    (b"data: 'open\n", "not valid YAML: line"),
    (b"a: 1\n---\nb: 2\n", "not valid YAML: line 2"),
    (b"data: &d {seed: 0}\nmodel: *d\n", "the alias *d is not allowed; write its value out"),
    (b"? [a, b]\n: 1\n", "line 1: expected a name before the colon"),
    (b"data: " + b"[" * 200 + b"]" * 200, "nested too deeply"),
    (b"data: " + b"[" * 100_000, "not valid YAML"),
    (b"a: " + b"b" * 2**20, "larger than 1048576 bytes"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_FILES)
def test_a_file_that_is_no_params_file(content: bytes, message: str, tmp_path: Path):
    assert message in faults_of(content, tmp_path)


def test_a_missing_file_and_a_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"params\.yaml is missing; run this in the project's fold"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        load_params(tmp_path)


def test_all_faults_at_once_in_the_order_of_the_file(tmp_path: Path):
    text = changed(
        data={"sorce": "x", "seed": -1},
        training={"epochs": 0, "batch_size": "big", "learning_rate": -1},
        scaling={"use_gpu": 1},
    ).replace("register:\n  promote: null\n", "")
    lines = faults_of(text + "extra: 1\n", tmp_path).splitlines()
    assert lines[0] == "params.yaml has 8 faults:"
    keys = [line.split(": ")[1] for line in lines[1:-1]]
    assert keys == [
        "data.seed",
        "data.sorce",
        "training.epochs",
        "training.batch_size",
        "training.learning_rate",
        "scaling.use_gpu",
        "extra",
    ]
    assert lines[-1] == "  register: the section is missing; its keys: promote"


def test_misspelt_and_missing_keys_and_sections(tmp_path: Path):
    text = changed().replace("  patience:", "  patiance:").replace("\nsweep:", "\nsweeps:")
    found = faults_of(text, tmp_path)
    assert "training.patiance: there is no such key; did you mean training.patience?" in found
    assert "training.patience: the key is missing; expected a whole number, or null" in found
    assert "sweeps: there is no such section; did you mean sweep?" in found
    assert "sweep: the section is missing; its keys: search, latent_dim, likelihood, space" in found


def test_duplicate_keys_name_both_lines(tmp_path: Path):
    text = changed()
    first = text.splitlines().index("register:") + 2
    twice = text.replace("  promote: null\n", "  promote: null\n  promote: true\n")
    assert f"expected once, stands in lines {first} and {first + 1}" in faults_of(twice, tmp_path)


def test_a_section_that_is_no_mapping(tmp_path: Path):
    text = changed().replace("register:\n  promote: null\n", "register: true\n")
    assert "register: expected a section with keys promote, got true" in faults_of(text, tmp_path)


def test_every_likelihood_outside_the_space_is_named(tmp_path: Path):
    found = faults_of(changed(data={"space": "binary"}), tmp_path)
    for name in LIKELIHOODS:
        assert f"likelihood {name} does not fit space binary" in found


SPACES = [
    ({"objective.bta": [1]}, "did you mean objective.beta?"),
    ({"hidden": [[8]]}, "did you mean model.hidden?"),
    ({"data.seed": [1]}, "sections: model, objective, training"),
    ({"training.epochs": [1]}, "trials are sweep.epochs long"),
    ({"model.latent_dim": [1]}, "its values stand in sweep.latent_dim"),
    ({"training.seed": [1]}, "sweep.num_seeds trains each point with several"),
    ({"objective.beta": 1}, "sweep.space.objective.beta: expected a list of one"),
    ({"objective.beta": [1, "2"]}, "objective.beta: expected a number, got '2'"),
    ({"objective.beta": [1, 1]}, "expected each value once, got [1, 1]"),
    ({"model.prior": ["norml", "vamp"]}, "did you mean normal?"),
    (
        {"objective.name": ["elbo", "iwae"], "objective.beta": [0.5, 1]},
        "objective.name iwae with objective.beta 0.5: iwae has no KL term of its own to weigh",
    ),
]


@pytest.mark.parametrize(("space", "words"), SPACES, ids=str)
def test_a_space_that_can_not_be_searched(space, words, tmp_path: Path):
    assert words in faults_of(changed(sweep={"space": space}), tmp_path)


RANGES = [
    ("training.learning_rate", {"log_uniform": [0, 1]}, "expected low above 0 for log_uniform"),
    ("training.learning_rate", {"uniform": [1, 0.1]}, "expected [low, high] with low below high"),
    ("training.learning_rate", {"uniform": [0.1]}, "expected [low, high] for uniform, got [0.1]"),
    ("training.learning_rate", {"integer": [1, 2]}, "one of uniform, log_uniform with [low, high]"),
    ("training.batch_size", {"uniform": [32, 64]}, "one of integer, log_integer with [low, high]"),
    ("training.batch_size", {"integer": [32, 64.5]}, "expected a whole number, got 64.5"),
    ("training.learning_rate", {}, "expected a list of values, or one of uniform, log_uniform"),
    ("model.prior", {"uniform": [0, 1]}, "expected a list of values, since it is no number"),
    ("model.min_scale", {"uniform": [0.1, 2]}, "expected a number between 0 and 1, got 2.0"),
    ("objective.free_bits", {"uniform": [-1, 2]}, "expected a number of at least 0, got -1.0"),
]


@pytest.mark.parametrize(("key", "value", "words"), RANGES, ids=str)
def test_a_range_that_the_key_does_not_allow(key, value, words, tmp_path: Path):
    sweep = {"search": "random", "space": {key: value}}
    assert words in faults_of(changed(sweep=sweep), tmp_path)


def test_all_faults_of_a_space_at_once_each_with_its_line(tmp_path: Path):
    space = {"objective.bta": [1], "training.learning_rate": [0], "hidden": [[8]]}
    found = faults_of(changed(sweep={"space": space}), tmp_path)
    assert "has 3 faults" in found
    assert found.count("line ") == 3


def test_the_axes_begin_with_latent_dimension_and_likelihood(tmp_path: Path):
    path = tmp_path / "params.yaml"
    space = {"model.hidden": [[8], [8, 4]], "training.batch_size": {"log_integer": [16, 256]}}
    sweep = {"search": "optuna", "latent_dim": [2, [4, 2]], "space": space}
    path.write_text(changed(model={"likelihood": "gaussian"}, sweep=sweep))
    axes = load_params(path).axes
    assert [(axis.key, axis.size) for axis in axes] == [
        ("model.latent_dim", 2),
        ("model.likelihood", 1),
        ("model.hidden", 2),
        ("training.batch_size", 241),
    ]
    assert axes[0].values == (2, (4, 2))


def test_asha_does_not_stop_trials_of_several_workers(tmp_path: Path):
    text = changed(sweep={"scheduler": "asha"}, scaling={"workers_per_trial": 2})
    assert "scaling.workers_per_trial: asha can stop trials of one" in faults_of(text, tmp_path)


def test_workers_of_a_trial_do_not_share_a_gpu(tmp_path: Path):
    scaling = {"workers_per_trial": 2, "gpus_per_trial": 0.5}
    assert "each of several workers needs a GPU" in faults_of(changed(scaling=scaling), tmp_path)


def test_a_pinned_likelihood_frees_the_sweeps_list(tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(changed(data={"space": "binary"}, model={"likelihood": "bernoulli"}))
    assert load_params(path).model.likelihood == "bernoulli"


TABLE = {"source": "table", "space": "continuous"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TABLE | {"space": "grey8"}, "data.space: source table gives real numbers; use continuous"),
        ({"space": "continuous"}, "source mnist5k gives 8-bit images; use grey8 or binary"),
        (TABLE | {"columns": ["a", "b", "a"]}, "expected each name once, got 'a' again"),
        (TABLE | {"columns": ["a", "b"], "label": "a"}, "'a' is one of data.columns, too"),
        (TABLE | {"size": 28}, "data.size: source table does not read it"),
        ({"source": "npz", "columns": ["a"]}, "data.columns: source npz does not read it"),
    ],
)
def test_keys_that_do_not_go_together(data: dict[str, Any], message: str, tmp_path: Path):
    sweep = {"likelihood": ["gaussian"]}
    assert message in faults_of(changed(data=data, sweep=sweep), tmp_path)


def test_conv_network_on_a_table_is_refused(tmp_path: Path):
    text = changed(
        data={"space": "continuous"},
        model={"network": "conv"},
        sweep={"likelihood": ["student_t"]},
    )
    assert "model.network: conv needs images" in faults_of(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E+0", 1.0), (".5", 0.5), ("1", 1.0), ("5_0.5", 50.5), ("+2.0", 2.0)],
)
def test_numbers_are_what_yaml_1_2_and_people_say(text: str, value: float, tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(spelt("learning_rate", text))
    found = load_params(path).training.learning_rate
    assert found == value
    assert isinstance(found, float)


@pytest.mark.parametrize("text", ["no", "on", "0x10", "1:30", "2020-01-01", "'1'"])
def test_text_that_yaml_1_1_would_turn_into_something_else(text: str, tmp_path: Path):
    found = faults_of(spelt("num_workers", text), tmp_path)
    assert "scaling.num_workers: expected a whole number at least 1, got '" in found


def test_hierarchical_latent_dim_and_byte_order_mark(tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + changed(model={"latent_dim": [100, 50]}).encode())
    assert load_params(path).model.latent_dim == (100, 50)


def test_sections_made_in_python_are_checked_too():
    with pytest.raises(ValueError, match="num_importance_samples: expected a whole number at lea"):
        EvaluateParams(
            num_importance_samples=0, target_se=None, proposal="encoder", precision="fp32", seed=0
        )
    with pytest.raises(ValueError, match=r"space: expected .*\nseed: expected"):
        DataParams(
            source="mnist5k",
            root="data/own",
            space="grey",  # type: ignore[arg-type]
            binarization="dynamic",
            size=None,
            channels=None,
            columns=None,
            missing="refuse",
            id=None,
            label=None,
            group=None,
            valid_fraction=0.1,
            test_fraction=0.1,
            seed=-1,
            limit=None,
        )
    with pytest.raises(ValueError, match=r"num_seeds: asha stops trials one by one"):
        SweepParams(
            search="grid",
            space={},
            num_trials=1,
            num_seeds=2,
            latent_dim=(2,),
            likelihood=("gaussian",),
            epochs=1,
            num_importance_samples=1,
            scheduler="asha",
            seed=0,
            max_concurrent=None,
        )


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
KEYS = [(name, key) for name, keys in yaml.safe_load(SHIPPED.read_text()).items() for key in keys]


@settings(max_examples=200, deadline=None)
@given(where=st.sampled_from(KEYS), value=SCALARS)
def test_any_value_anywhere_loads_or_is_told(
    where: tuple[str, str], value: object, tmp_path_factory: pytest.TempPathFactory
):
    section, key = where
    path = tmp_path_factory.mktemp("fuzz") / "params.yaml"
    path.write_text(changed(**{section: {key: value}}), encoding="utf-8")
    said = told(path)
    assert said is None or f"{section}.{key}" in said or "not valid YAML" in said


def told(path: Path) -> str | None:
    """What a person is told about the file; None when it is right."""
    try:
        load_params(path)
    except UserError as error:
        return str(error)
    return None


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_told(raw: bytes, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("fuzz") / "params.yaml"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"params\.yaml"):
        load_params(path)


def test_the_command_prints_the_faults_and_exits_with_1(tmp_path: Path):
    (tmp_path / "params.yaml").write_text(changed(data={"seed": -1}))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.params"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(SHIPPED.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: params.yaml has 1 fault:\n")
    assert "Traceback" not in done.stderr
