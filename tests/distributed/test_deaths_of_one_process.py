"""One of two processes dies, or cannot read an image: the other one ends with an error, and neither waits (gloo, CPU).

Nobody looks after the processes here: `torchrun` and `accelerate launch` would end the others besides.
"""

import signal

import pytest
from support.launching import launch_alone, launch_by_command
from support.together import SCRIPT, given

SLOW = pytest.mark.slow
#: Seconds after which a wait for another process must end, and those after which the test takes it for a hang.
PATIENCE, HANG = 15, 90


def train(output, kind, rank, **fault):
    """The exit codes of both processes and what they have written; 6 steps an epoch, replay begins with step 6."""
    arguments = {"per_device_train_batch_size": 4, "save_strategy": "epoch", "ddp_timeout": PATIENCE}
    settings = {"config": {"points": "1:3", "codec": "fp32"}, "arguments": arguments}
    settings["fault"] = {"kind": kind, "rank": rank, **fault}
    ended = launch_alone(given(output, settings), timeout=HANG, script=SCRIPT)
    return [process.returncode for process in ended], [process.stderr for process in ended]


DEATHS = [("dies_in_build", {}), ("dies_in_step", {"step": 8}), ("dies_at_checkpoint", {})]


@pytest.mark.parametrize(
    ("kind", "fault", "rank", "how"),
    [
        pytest.param(kind, fault, rank, how, marks=[] if (kind, rank, how) == ("dies_in_build", 0, "kill") else SLOW)
        for kind, fault in DEATHS
        for rank in (0, 1)
        for how in ("kill", "exit")
    ],
)
def test_death_of_a_process_ends_the_other_with_an_error(kind, fault, rank, how, tmp_path):
    codes, errors = train(tmp_path, kind, rank, how=how, **fault)
    assert codes[rank] == (-signal.SIGKILL if how == "kill" else 13)
    assert codes[1 - rank] == 1 and "Connection" in errors[1 - rank]
    left = {path.name.partition(".tmp-")[2] != "" for path in tmp_path.glob("cache/*")}
    if kind == "dies_in_build":  # the main process takes away what is not finished; the next training what it left
        assert left == ({True} if rank == 0 else set())


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=SLOW)])
def test_image_that_one_process_cannot_read_in_a_build_is_an_error_of_both(rank, tmp_path):
    """Not a training that goes on without a store: what cannot be read for it could not be read for a step."""
    codes, errors = train(tmp_path, "unreadable_in_build", rank, step=6)
    assert codes == [1, 1] and not list(tmp_path.glob("cache/*"))
    assert "UnreadableImage: image" in errors[rank] and f"process {rank}: image" in errors[1 - rank]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW)])
def test_image_that_one_process_cannot_read_at_the_beginning_is_an_error_of_both(rank, tmp_path):
    """One looks at samples, and the other waits for what it finds."""
    codes, errors = train(tmp_path, "unreadable_at_first", rank)
    assert codes == [1, 1]
    assert "UnreadableImage: image" in errors[rank] and f"process {rank}: image" in errors[1 - rank]


@SLOW
@pytest.mark.parametrize("rank", [0, 1])
def test_image_that_one_process_cannot_read_in_an_epoch_ends_both(rank, tmp_path):
    codes, errors = train(tmp_path, "unreadable", rank, step=2)
    assert codes == [1, 1]
    assert "UnreadableImage: image" in errors[rank] and "Connection" in errors[1 - rank]


@SLOW
def test_process_that_stands_still_ends_the_other_after_the_timeout(tmp_path):
    codes, errors = train(tmp_path, "stands_still", 1, step=8)
    assert codes == [1, -signal.SIGALRM] and "Timed out" in errors[0]


@SLOW
@pytest.mark.parametrize("kind", ["dies_in_build", "unreadable_in_build"])
def test_launcher_ends_with_the_error_of_one_process(kind, tmp_path):
    settings = {
        "config": {"points": "1:3", "codec": "fp32"},
        "arguments": {"per_device_train_batch_size": 4},
        "fault": {"kind": kind, "rank": 1, "how": "kill", "step": 6},
    }
    log = launch_by_command(given(tmp_path, settings), script=SCRIPT, fails=True)
    assert ("SIGKILL" if kind == "dies_in_build" else "process 1: image") in log
