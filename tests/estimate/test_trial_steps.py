"""Steps of a training that are timed, and the memory of their peak."""

import torch
from support import zoo
from support.builds import make_spec

from hf_freezecache.estimate.trial_steps import TrialSteps
from hf_freezecache.rng import preserve_rng


def test_peak_memory_counts_weights_gradients_optimizer_and_activations(tmp_path):
    """A linear head on one vector: its input is all that is kept for the backward pass."""
    chain = make_spec(zoo.make("vit"), tmp_path).chain
    network = torch.nn.Linear(10, 3)
    steps = TrialSteps(chain, loss=lambda model, inputs: network(inputs["x"]).sum())
    steps.chain = type(
        "Chain",
        (),
        {
            "model": network,
            "prefix_parameters": lambda self, cut: {},
            "prefix_modules": lambda self, cut: [],
            "replay": lambda self, cut, features, main_input: preserve_rng(),
        },
    )()
    seconds, peak = steps.measure(0, [{"x": torch.randn(4, 10)}])
    weights = (10 * 3 + 3) * 4
    adam = 2 * weights + 2 * 4  # two moments, and a step number for each of the two parameters
    assert peak == 2 * weights + adam + 4 * 10 * 4
    assert seconds > 0
