"""From recorded trainings to a predictor that knows what has settled."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.recorded_runs import made_up_run, made_up_runs

from hf_freezecache.smartfrz.evaluation import cuts_of, score, without_each_network
from hf_freezecache.smartfrz.fitting import Fitting, fit
from hf_freezecache.smartfrz.labels import LabelRule
from hf_freezecache.smartfrz.recording import RecordedRun
from hf_freezecache.smartfrz.windows import load_runs, make_windows, split_runs

RULE = LabelRule(remaining=0.1, window=1)


@pytest.fixture(scope="module")
def fitted():
    training, validation = split_runs(made_up_runs(), 0.25, 0)
    return fit(training, validation, RULE, Fitting(epochs=12), window=8)


def test_runs_are_saved_and_loaded_as_they_were(tmp_path):
    run = made_up_run("a", "net", 1)
    run.save(tmp_path / "train" / "a.safetensors")
    [again] = load_runs(tmp_path)
    assert again.facts == run.facts and np.array_equal(again.fixed, run.fixed) and np.array_equal(again.cka, run.cka)
    with pytest.raises(FileNotFoundError, match="no recorded training"):
        load_runs(tmp_path / "empty")
    torch.manual_seed(0)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no recorded training"):
        RecordedRun.load(tmp_path / "other.safetensors")
    replace(run, fixed=run.fixed[:, :, :-1]).save(tmp_path / "older.safetensors")
    with pytest.raises(ValueError, match="recorded by another version: 55 values a snapshot"):
        RecordedRun.load(tmp_path / "older.safetensors")


def test_windows_end_with_the_snapshot_that_is_labelled():
    run = made_up_run("a", "net", 1, (0.5,))
    windows = make_windows([run], RULE, 8, "fixed")
    assert windows.histories.shape[:2] == (55, 8) and windows.lengths[:3].tolist() == [6, 7, 8]
    assert torch.equal(windows.histories[10, -1], torch.from_numpy(run.fixed[15, 0]))
    assert not windows.histories[0, :2].any() and windows.histories[0, 2].any()
    assert windows.labels.tolist() == RULE.settled(run.cka)[5:-1, 0].tolist()
    assert float(windows.weights.sum()) == pytest.approx(1.0)


def test_whole_runs_of_every_network_validate():
    training, validation = split_runs(made_up_runs(), 0.25, 0)
    assert {run.facts.network for run in validation} == {run.facts.network for run in training}
    assert len(validation) == 3 and not {run.facts.run for run in training} & {run.facts.run for run in validation}
    alone = [made_up_run("a", "net", 1)]
    assert split_runs(alone, 0.25, 0) == (alone, [])


def test_a_predictor_learns_what_can_be_seen(fitted):
    predictor, history = fitted
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]
    found = score(predictor, [made_up_run("new", "other", 99, (0.3, 0.6, 0.8))], RULE)
    assert found.precision > 0.9 and found.recall > 0.8 and found.brier < 0.5 * found.brier_of_the_share


def test_training_is_repeated_bit_for_bit_and_draws_nothing(fitted):
    training, validation = split_runs(made_up_runs(), 0.25, 0)
    before = torch.get_rng_state()
    again, history = fit(training, validation, RULE, Fitting(epochs=12), window=8)
    assert torch.equal(torch.get_rng_state(), before) and history == fitted[1]
    assert all(torch.equal(value, fitted[0].state_dict()[name]) for name, value in again.state_dict().items())


def test_each_network_is_scored_by_a_predictor_that_has_not_seen_it():
    seen = []

    def make(runs):
        seen.append({run.facts.network for run in runs})
        return fit(runs, runs, RULE, Fitting(epochs=1), window=8)[0]

    found = without_each_network(made_up_runs(3, 2), make, RULE)
    assert sorted(found) == ["net0", "net1", "net2"]
    assert seen == [{"net1", "net2"}, {"net0", "net2"}, {"net0", "net1"}]


def test_cuts_by_hindsight_grow_as_blocks_settle(fitted):
    cuts = cuts_of(fitted[0], made_up_run("new", "other", 99, (0.2, 0.5, 0.8)), 0.5, 4)
    assert cuts == sorted(cuts) and cuts[5] == 0 and cuts[-2] >= 2
    late_first = cuts_of(fitted[0], made_up_run("new", "other", 99, (0.8, 0.2, 0.2)), 0.5, 4)
    assert late_first[40] == 0  # a settled block behind one that is not waits
