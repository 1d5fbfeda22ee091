"""What a sweep plans and remembers; no trial runs here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cluster import open_storage
from pipeline.params import Axis, Range, SweepParams, load_params
from pipeline.sweep import (
    Journal,
    Space,
    Trial,
    job_at,
    known_points,
    planned,
    trial_id,
    tune_arguments,
)
from pipeline.train import TrainingJob, chosen_training
from vae.models import VAEConfig
from vae.objectives import Objective
from vae.training import TrainingConfig

ROOT = Path(__file__).parents[3]
SIZES = Axis(key="model.latent_dim", values=(2, 4))
HIDDEN = Axis(key="model.hidden", values=((8,), (8, 8)))
RATE = Axis(
    key="training.learning_rate", values=Range(low=1e-3, high=1e-1, integer=False, log=True)
)
SPACE = Space(axes=(SIZES, HIDDEN, RATE), first_seed=10)
JOB = TrainingJob(
    model=VAEConfig(data_shape=(1, 4, 4), space="grey8", latent_dim=1, likelihood="gaussian"),
    objective=Objective(),
    training=TrainingConfig(),
)


def sweep(**changes) -> SweepParams:
    return replace(load_params(ROOT / "params.yaml").sweep, **changes)


def trial(size: int, rate: float, seed: int = 10, hidden: tuple[int, ...] = (8, 8)) -> Trial:
    values = (size, hidden, rate)
    keys = ("model.latent_dim", "model.hidden", "training.learning_rate")
    return Trial(point=dict(zip(keys, values, strict=True)), seed=seed)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(open_storage(str(tmp_path)), "sweep-1", JOB)


def reopened(journal: Journal) -> Journal:
    return Journal(journal.storage, "sweep-1", JOB)


def test_every_point_is_trained_once_before_any_a_second_time():
    found = planned([SIZES], sweep(num_seeds=2, seed=5))
    assert found == [
        Trial(point={"model.latent_dim": size}, seed=seed) for seed in (5, 6) for size in (2, 4)
    ]


def test_optuna_plans_nothing_ahead():
    assert planned([SIZES], sweep(search="optuna")) is None
    assert len(planned([SIZES, RATE], sweep(search="random", num_trials=7)) or []) == 7


def test_a_trial_is_the_job_with_its_point_and_seed():
    job = job_at(JOB, trial(4, 0.05, seed=3))
    assert (job.model.latent_dim, job.model.hidden) == (4, (8, 8))
    assert (job.training.learning_rate, job.training.seed) == (0.05, 3)
    assert job.objective == JOB.objective


def test_a_trials_id_is_that_of_its_whole_job():
    one = trial_id(JOB, trial(4, 0.05))
    assert one == trial_id(replace(JOB, threads=8), trial(4, 0.05))  # scaling decides no result
    other = replace(JOB, objective=Objective(beta=0.5))
    ids = {one, trial_id(other, trial(4, 0.05)), trial_id(JOB, trial(4, 0.05, seed=11))}
    assert len(ids | {trial_id(JOB, trial(4, 0.06))}) == 4


def test_what_optuna_proposes_is_decoded():
    config = {"model.latent_dim": 1, "model.hidden": 0, "training.learning_rate": 0.02}
    assert SPACE.trial(config | {"__trial_index__": 2}) == trial(4, 0.02, 12, hidden=(8,))


def test_the_journal_survives_to_the_next_start(journal: Journal):
    done, begun, failed = trial(2, 0.01), trial(4, 0.02), trial(4, 0.03)
    for one in (done, begun, failed):
        journal.start(one)
    folder = Path(journal.storage.root) / "sweep-1" / "attempt_1" / "checkpoint"
    folder.mkdir(parents=True)
    journal.save(begun, str(folder))
    journal.save(done, str(folder))
    journal.finish(done, {"status": "ok", "model.hidden": (8, 8), "valid_log_px": -1.5})
    journal.finish(failed, {"status": "died"})
    again = reopened(journal)
    assert again.checkpoints() == {again.id(begun): str(folder)}
    assert {name for name, r in again.records.items() if r.finished} == {again.id(done)}
    assert again.records[again.id(begun)].point == begun.point  # tuples again
    row = again.records[again.id(done)].row
    assert row == {"status": "ok", "model.hidden": (8, 8), "valid_log_px": -1.5}
    again.clear()  # one died and one is unfinished: they may go on from there
    assert folder.exists()
    again.finish(begun, {"status": "diverged"})
    again.finish(failed, {"status": "ok"})
    again.clear()
    assert not folder.parent.exists()
    assert set(reopened(journal).records) == set(again.records)


def test_a_record_that_a_kill_cut_short_counts_as_none(journal: Journal):
    journal.start(trial(2, 0.01))
    (file,) = (Path(journal.storage.root) / "sweep-1" / "trials").glob("*.json")
    file.write_text(file.read_text()[:20])
    assert reopened(journal).records == {}


def test_a_lost_checkpoint_is_not_gone_on_from(journal: Journal):
    journal.start(trial(2, 0.01))
    journal.save(trial(2, 0.01), str(Path(journal.storage.root) / "nowhere"))
    assert journal.checkpoints() == {}


def test_optuna_is_told_of_the_points_before_in_their_order(journal: Journal):
    for one in (trial(4, 0.03), trial(2, 0.01), trial(4, 0.03, seed=11), trial(2, 0.5)):
        journal.start(one)
    other = Journal(journal.storage, "sweep-1", replace(JOB, objective=Objective(beta=0.5)))
    other.start(trial(2, 0.02))
    again = reopened(journal)
    # 0.5 lies outside the space, 0.02 was tried with another objective
    assert known_points(SPACE, again) == [trial(4, 0.03).point, trial(2, 0.01).point]
    param_space, search = tune_arguments(SPACE, sweep(search="optuna", num_seeds=2), again, None)
    assert param_space == {}
    assert search["num_samples"] == 32
    found = [SPACE.trial(search["search_alg"].suggest(name)) for name in "abcdef"]
    assert found[:4] == [
        trial(4, 0.03, 10), trial(4, 0.03, 11), trial(2, 0.01, 10), trial(2, 0.01, 11),
    ]  # fmt: skip
    assert found[4].point == found[5].point
    assert found[4].point not in known_points(SPACE, again)


def test_train_takes_the_swept_training_keys_and_says_so(capsys: pytest.CaptureFixture[str]):
    own = TrainingConfig(epochs=7, learning_rate=0.002, batch_size=64)
    found = chosen_training(own, {"learning_rate": 0.0312345, "batch_size": 64})
    assert found == replace(own, learning_rate=0.0312345)
    assert capsys.readouterr().out == (
        "train      learning_rate 0.03123 from the sweep, not 0.002 as in params.yaml\n"
    )
