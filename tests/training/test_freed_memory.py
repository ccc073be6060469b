"""What a freeze frees: gradients and states of the optimizer are there for live parameters, and for no others."""

import pytest
import torch
from support.helpers import manual, pixel_dataset, run, tiny_resnet, tiny_vit
from transformers import TrainerCallback


class Counting(TrainerCallback):
    """Bytes of the last step of each epoch."""

    def __init__(self):
        self.gradients, self.states, self.live = [], [], []

    def on_epoch_begin(self, args, state, control, **kwargs):
        for counts in (self.gradients, self.states, self.live):
            counts.append(0)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients[-1] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        self.live[-1] = sum(p.nbytes for p in model.parameters() if p.requires_grad)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        tensors = (value for own in optimizer.optimizer.state.values() for value in own.values())
        self.states[-1] = sum(value.nbytes for value in tensors if torch.is_tensor(value) and value.dim())


@pytest.mark.parametrize("cache", ["always", "never"])
@pytest.mark.parametrize(
    ("make", "size", "optimizer", "copies"),
    [
        (tiny_vit, 16, {"optim": "adamw_torch"}, 2),
        (tiny_resnet, 32, {"optim": "sgd", "optim_args": "momentum=0.9"}, 1),
    ],
    ids=["AdamW", "momentum"],
)
def test_gradients_and_states_are_those_of_live_parameters(make, size, optimizer, copies, cache, tmp_path):
    counted = Counting()
    config = manual("1:2,2:3", cache=cache)
    run(make(), pixel_dataset(16, size), tmp_path, config, callbacks=[counted], num_train_epochs=3, **optimizer)
    whole = sum(parameter.nbytes for parameter in make().parameters())
    assert counted.live[0] == whole > counted.live[1] > counted.live[2] > 0
    assert counted.gradients == counted.live
    assert counted.states == [copies * live for live in counted.live]
