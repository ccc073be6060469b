"""N processes train as one with the same global batch, whatever samples each of them gets (gloo, CPU)."""

import pytest
from script_settings import train
from support.launching import launch
from support.together import SCRIPT, close, given, same, train_together

SLOW = pytest.mark.slow
#: Of all processes together: 48 samples make 6 steps an epoch, 4 epochs.
GLOBAL_BATCH = 8


def settings(processes, cache="always", **more):
    config = {"points": "1:3", "codec": "fp32", "cache": cache, "on_mismatch": "error", **more.pop("config", {})}
    arguments = {"per_device_train_batch_size": GLOBAL_BATCH // processes, **more.pop("arguments", {})}
    return {"config": config, "arguments": arguments, **more}


def alone(output, given_settings):
    output.mkdir()
    seen, weights = train(output, given_settings)
    return [seen], weights


@pytest.mark.parametrize(
    ("processes", "cache"),
    [(2, "always"), *(pytest.param(n, c, marks=SLOW) for n, c in [(2, "never"), (4, "always"), (4, "never")])],
)
def test_processes_train_as_one_with_the_same_global_batch(processes, cache, tmp_path):
    one = alone(tmp_path / "one", settings(1, cache))
    several = train_together(tmp_path / "several", settings(processes, cache), processes)
    assert [seen["processes"] for seen in several[0]] == [processes] * processes
    assert all(seen["replaying"] == (cache == "always") and seen["cut"] == 3 for seen in several[0])
    assert close(one, several)


@SLOW
@pytest.mark.parametrize("processes", [2, 4])
def test_batch_norm_behind_the_cut_sees_the_batch_of_its_process(processes, tmp_path):
    """As under plain `Trainer`: N processes are one only where all BatchNorm is frozen. Replay changes nothing."""

    def resnet(count, cache="always", **more):
        # This model takes any argument and leaves `num_items_in_batch`: `Trainer` would multiply its loss by N.
        arguments = {"average_tokens_across_devices": False}
        return settings(count, cache, model="resnet", arguments=arguments, **more)

    runs = {
        cache: train_together(tmp_path / cache, resnet(processes, cache), processes) for cache in ("always", "never")
    }
    assert same(runs["always"], runs["never"]) and runs["always"][0][0]["replaying"]
    one = alone(tmp_path / "one", resnet(1))
    assert not close(one, runs["always"], atol=1e-3)

    frozen = {"points": "0:5"}
    one = alone(tmp_path / "frozen one", resnet(1, config=frozen))
    several = train_together(tmp_path / "frozen several", resnet(processes, config=frozen), processes)
    assert close(one, several)


WAYS = [
    ({"dispatch_batches": True}, 51),
    *(
        pytest.param(config, rows, marks=SLOW)
        for config, rows in [
            ({"dispatch_batches": True}, 49),
            ({"dispatch_batches": True, "split_batches": True}, 50),
            ({"dispatch_batches": True, "even_batches": False}, 51),
            ({"split_batches": True}, 50),
            ({"split_batches": True}, 51),
            ({"even_batches": True}, 51),
            ({"even_batches": False}, 47),
            ({"even_batches": False, "split_batches": True}, 51),
        ]
    ),
]


@pytest.mark.parametrize(("accelerator_config", "rows"), WAYS)
def test_cached_is_freeze_only_however_batches_are_dealt(accelerator_config, rows, tmp_path):
    """Also where the samples cannot be divided by the number of processes."""
    more = {"rows": rows, "arguments": {"accelerator_config": accelerator_config}}
    runs = {
        cache: train_together(tmp_path / cache, settings(2, cache, **dict(more, arguments={**more["arguments"]})))
        for cache in ("always", "never")
    }
    assert same(runs["always"], runs["never"])
    assert all(seen["replaying"] for seen in runs["always"][0])
    assert len({seen["steps"] for seen in runs["always"][0] + runs["never"][0]}) == 1


@pytest.mark.parametrize(
    ("accelerator_config", "counts"),
    [
        ({"even_batches": False}, r"\[7, 6\]"),
        pytest.param({"even_batches": False, "split_batches": True}, r"\[13, 12\]", marks=SLOW),
    ],
)
def test_processes_with_other_numbers_of_batches_are_refused(accelerator_config, counts, tmp_path):
    """They would wait for each other. Where batches are split, the length of the loader does not tell."""
    batch = {"per_device_train_batch_size": 4, "accelerator_config": accelerator_config}
    log = launch(given(tmp_path, settings(2, rows=50, arguments=batch)), script=SCRIPT, fails=True, timeout=90)
    assert "(even_batches=False)" in log and "dataloader_drop_last=True" in log
    assert counts.replace("\\", "") in log


@SLOW
def test_processes_with_other_numbers_of_batches_are_plain_training_under_the_defaults(tmp_path):
    """Which fails in one process when the other has no batch any more, as `Trainer` does; it is told before."""
    batch = {"per_device_train_batch_size": 4, "accelerator_config": {"even_batches": False}, "ddp_timeout": 15}
    log = launch(given(tmp_path, {"rows": 50, "config": None, "arguments": batch}), script=SCRIPT, fails=True)
    assert log.count("Nothing is frozen or cached, this is plain training: the processes get [7, 6] batches") == 1
