"""Models and states on disk: whole, checked by hash, and never a pickle."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

from vae.models import VAE, CheckpointError, VAEConfig, load, save
from vae.training import TrainingState, load_state, save_state


def new_model(**changes):
    config = {"data_shape": (1, 3, 5), "space": "binary", "latent_dim": 2} | {
        "likelihood": "bernoulli",
        "hidden": (8,),
        **changes,
    }
    return VAE(VAEConfig(**config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loaded_model_is_the_saved_one(tmp_path, dtype):
    model = new_model().to(dtype)
    model.set_data_statistics(torch.full((1, 3, 5), 0.25), torch.full((1, 3, 5), 0.4))
    save(model, tmp_path / "vae")
    loaded = load(tmp_path / "vae")
    assert loaded.config == model.config
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert loaded.state_dict()[name].dtype == value.dtype


def test_hierarchical_config_survives(tmp_path):
    save(new_model(latent_dim=(4, 2)), tmp_path / "vae")
    assert load(tmp_path / "vae").config.latent_dim == (4, 2)


def test_changed_weights_are_refused(tmp_path):
    save(new_model(), tmp_path / "vae")
    weights = tmp_path / "vae" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or was changed"):
        load(tmp_path / "vae")


def test_planted_pickle_is_refused_and_does_not_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "vae"
    save(new_model(), folder)
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(CheckpointError, match="damaged or was changed"):
        load(folder)
    facts = json.loads((folder / "config.json").read_text())
    import hashlib

    planted = (folder / "weights.safetensors").read_bytes()
    facts["weights_sha256"] = hashlib.sha256(planted).hexdigest()
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_planted_in_a_training_state_is_refused_and_does_not_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    model, folder = new_model(), tmp_path / "state"
    save_state(model, TrainingState(), folder)
    (folder / "state.safetensors").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        load_state(model, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json"])
def test_missing_file_is_named(tmp_path, name):
    save(new_model(), tmp_path / "vae")
    (tmp_path / "vae" / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(tmp_path / "vae")


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe"])
def test_damaged_config_is_named(tmp_path, content):
    save(new_model(), tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path / "vae")


def test_state_of_another_model_is_refused(tmp_path):
    save_state(new_model(), TrainingState(), tmp_path / "state")
    with pytest.raises(CheckpointError, match="another model's"):
        load_state(new_model(latent_dim=3), tmp_path / "state")


def test_killed_while_saving_leaves_the_former_model(tmp_path):
    """kill -9 in the middle of many saves: what is there always loads."""
    program = (
        "import sys\n"
        "from vae.models import save, load\n"
        "model = load(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while True: save(model, sys.argv[1])\n"
    )
    folder = tmp_path / "vae"
    save(new_model(), folder)
    for delay in (0.05, 0.11, 0.23):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert load(folder).config.latent_dim == 2
