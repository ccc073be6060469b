"""Two processes train without gradients together (gloo, CPU): they exchange losses, and nothing else."""

from pathlib import Path

import pytest
import torch
from support.launching import launch, seen_by

SCRIPT = Path(__file__).with_name("script_zero_order.py")


def test_two_processes_exchange_losses_and_are_one_with_larger_batches(tmp_path):
    runs = {}
    for name, processes, arguments in [
        ("cached", 2, []),
        ("frozen", 2, ["--cache", "never"]),
        ("alone", 1, ["--batch", 8]),
    ]:
        (tmp_path / name).mkdir()
        launch(["--output", tmp_path / name, *arguments], processes=processes, script=SCRIPT)
        runs[name] = seen_by(tmp_path / name)
    first, second = runs["cached"]
    assert first["replaying"] and first["weights"] == second["weights"]
    assert len(first["exchanged"]) == 4 * 6 and set(first["exchanged"]) == {2}
    assert first["gradients"] == second["gradients"] == 0
    # No wrapper, which would keep buffers for gradients.
    assert not first["is_wrapped"] and not second["is_wrapped"]
    assert first["is_wrapped_later"] and first["later"] == second["later"] != first["weights"]
    assert runs["frozen"][0]["weights"] == first["weights"] and runs["frozen"][0]["losses"] == first["losses"]
    [alone] = runs["alone"]
    assert first["losses"][:6] == pytest.approx(alone["losses"][:6], rel=1e-3)
    assert torch.allclose(torch.tensor(first["head"]), torch.tensor(alone["head"]), atol=1e-2)
