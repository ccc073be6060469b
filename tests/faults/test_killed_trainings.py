"""A training that is killed at any moment, and resumed, ends with the weights of the uninterrupted one."""

import json

import pytest
from support.helpers import make_args, manual, messages, pixel_dataset, tiny_vit

from benchmarks.faults.kills import PLANS, run_whole, tell_stories
from benchmarks.faults.trainings import PHASES
from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.training.checkpoint_state import find_checkpoints


def run_wholes(plans, folder):
    return {plan: run_whole(plan, folder / plan) for plan in plans}


def kill(wholes, seed, kills, phases, folder):
    stories = list(tell_stories(wholes, seed, kills, folder, phases))
    assert [story for story in stories if not story.survived] == []
    return [phase for story in stories for phase in story.killed_in]


@pytest.mark.slow
def test_training_that_is_killed_at_a_checkpoint_and_in_a_writing_epoch_ends_as_the_uninterrupted_one(
    processes, tmp_path
):
    wholes = run_wholes(["write-through"], tmp_path)
    killed_in = kill(wholes, 0, 2, ["checkpointing", "write-through"], tmp_path / "killed")
    assert len(killed_in) == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_forty_kills_at_any_moment_and_in_every_phase_lose_nothing(processes, tmp_path):
    aimed = [phase for phase in PHASES if phase != "resuming"]
    wholes = run_wholes(PLANS, tmp_path)
    killed_in = kill(wholes, 5, 40, [phase for name in aimed for phase in (name, None)], tmp_path / "killed")
    assert len(killed_in) == 40
    for seed in range(20):  # a busy machine may have missed a short phase
        missed = [phase for phase in aimed if phase not in killed_in]
        if missed:
            killed_in += kill(wholes, seed, 1, missed[:1], tmp_path / f"missed-{seed}")
    assert set(killed_in) == set(PHASES)


# Checkpoints that were being written


def trainer_of(folder):
    return FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(folder, num_train_epochs=2, save_strategy="epoch"),
        train_dataset=pixel_dataset(),
        freeze_cache=manual("1:2"),
    )


@pytest.fixture
def trained(tmp_path):
    trainer_of(tmp_path).train()
    return tmp_path


@pytest.mark.parametrize("how", ["no state", "half a state", "no weights"])
def test_newest_checkpoint_is_passed_over_where_it_is_incomplete(how, trained, caplog):
    newest = trained / "checkpoint-8"
    state = newest / "trainer_state.json"
    if how == "half a state":
        state.write_text(state.read_text()[:100])
    else:
        state.unlink()
    if how == "no weights":
        (newest / "model.safetensors").unlink()
    trainer = trainer_of(trained)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8 and json.loads(state.read_text())["global_step"] == 8
    assert f"passed over: {newest}. The training goes on from {trained / 'checkpoint-4'}" in messages(caplog)


def test_training_whose_only_checkpoint_is_incomplete_begins_anew(trained, caplog):
    for path in trained.glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    trainer = trainer_of(trained)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8 and "The training begins anew" in messages(caplog)
    assert len(find_checkpoints(trained)[0]) == 2


def test_without_any_checkpoint_it_is_an_error_as_ever(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_checkpoints_are_ordered_by_their_steps(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-100", "checkpoint-x", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text("[")
    (tmp_path / "checkpoint-200").write_text("a file")
    complete, incomplete = find_checkpoints(tmp_path)
    assert [path.name for path in complete] == ["checkpoint-9", "checkpoint-10"]
    assert [path.name for path in incomplete] == ["checkpoint-100"]
    assert find_checkpoints(tmp_path / "missing") == ([], [])
