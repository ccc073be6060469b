"""A training goes on in another number of processes (gloo, CPU): 48 samples, 6 steps an epoch, replay from step 6."""

import pytest
from script_settings import train
from support.together import close, same, train_together

SLOW = pytest.mark.slow


def settings(processes, stop_after=None, resume=False, global_batch=8, **config):
    arguments = {"per_device_train_batch_size": global_batch // processes, "save_strategy": "epoch"}
    given = {"config": {"points": "1:3", "codec": "fp32", **config}, "resume": resume, "arguments": arguments}
    return given if stop_after is None else {**given, "stop_after": stop_after}


def alone(output, given):
    output.mkdir(exist_ok=True)
    seen, weights = train(output, given)
    return [seen], weights


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param({"materialize": "write_through"}, marks=SLOW),
        pytest.param({"cache": "never"}, marks=SLOW),
    ],
)
def test_training_goes_on_in_two_processes_and_in_one_again(config, tmp_path):
    """In the middle of a live epoch, and of one on the store: with batches of another size for each process."""
    whole = alone(tmp_path / "whole", settings(1, **config))
    path = tmp_path / "parts"
    alone(path, settings(1, 4, **config))
    two = train_together(path, settings(2, 15, resume=True, **config))
    assert [seen["steps"] for seen in two[0]] == [15, 15]
    parts = alone(path, settings(1, resume=True, **config))
    assert parts[0][0]["steps"] == 24 and close(whole, parts)
    if not config:
        assert two[0][0]["built"] == 1 == parts[0][0]["built"] and parts[0][0]["replaying"]
        assert len(list((path / "cache").iterdir())) == 1  # what two have written, one has gone on with


@SLOW
@pytest.mark.timeout(1200)
def test_training_goes_on_in_one_two_four_processes_and_in_one_again(tmp_path):
    whole = train_together(tmp_path / "whole", settings(1), 1, by_command=True)
    path, parts = tmp_path / "parts", None
    for processes, stop_after in [(1, 6), (2, 12), (4, 18), (1, None)]:
        given = settings(processes, stop_after, resume=parts is not None)
        parts = train_together(path, given, processes, by_command=True)
        assert len(parts[0]) == processes
        assert {seen["steps"] for seen in parts[0]} == {stop_after or 24}
    assert close(whole, parts) and parts[0][0]["built"] == 1


@SLOW
def test_other_global_batch_goes_on_where_plain_trainer_would_and_cached_is_freeze_only(tmp_path):
    """`Trainer` counts steps: with half of the steps an epoch, 12 of them are four epochs in place of two."""
    runs = {}
    for cache in ("always", "never"):
        alone(tmp_path / cache, settings(1, 12, cache=cache))
        runs[cache] = train_together(tmp_path / cache, settings(2, resume=True, global_batch=12, cache=cache))
        assert {seen["steps"] for seen in runs[cache][0]} == {16}  # 4 epochs of 4 steps
    assert same(runs["always"], runs["never"])
    assert runs["always"][0][0]["replaying"] and runs["always"][0][0]["cut"] == 3
