from collections import defaultdict, deque

import pytest
import torch
from support.helpers import assert_same_weights, make_args, manual, pixel_dataset, tiny_vit, weights
from torch import nn

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.training.trainer_state import remembering


class Holder:
    compute_loss_func = None

    def __init__(self, model):
        self.count, self.losses, self.queue, self.seen = 0, defaultdict(list), deque([1, 2], maxlen=2), {1}
        self.mean, self.average, self.model = torch.zeros(2), nn.Linear(2, 2), model
        self.losses["train"].append(1.0)


def test_what_a_step_changes_in_a_trainer_is_put_back():
    model = nn.Linear(2, 2)
    holder = Holder(model)
    kept, losses = [value.detach().clone() for value in holder.average.parameters()], holder.losses
    with pytest.raises(RuntimeError), remembering(holder, model):
        holder.count += 1
        holder.late = True
        holder.losses["train"].append(2.0)
        holder.losses["eval"].append(2.0)
        holder.queue.append(3)
        holder.seen.add(2)
        holder.mean += 1
        holder.average.weight.data.mul_(2)
        raise RuntimeError
    assert (holder.count, dict(holder.losses), list(holder.queue)) == (0, {"train": [1.0]}, [1, 2])
    assert holder.losses is losses and holder.seen == {1} and not hasattr(holder, "late")
    assert not holder.mean.any()
    assert all(torch.equal(one, other) for one, other in zip(holder.average.parameters(), kept, strict=True))


class Counting(FreezeCacheTrainer):
    """A weight of the loss that rises with every call, and a log entry."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        self.log({"calls": self.calls})
        return super().compute_loss(*args, **kwargs) * (1 + 0.01 * self.calls)


def test_rehearsals_leave_no_trace_in_the_trainer(tmp_path):
    trained = []
    for cache in ("always", "never"):
        args, config = make_args(tmp_path / cache, num_train_epochs=2), manual("1:2", cache=cache, codec="fp32")
        trainer = Counting(tiny_vit(), args, train_dataset=pixel_dataset(), freeze_cache=config)
        trainer.train()
        trained.append(trainer)
    cached, frozen = trained
    assert cached.freeze_status().replaying
    assert cached.calls == frozen.calls == cached.state.global_step
    assert [entry["calls"] for entry in cached.state.log_history if "calls" in entry] == list(
        range(1, cached.calls + 1)
    )
    assert_same_weights(weights(cached), weights(frozen))
