"""Chains of blocks that are cut and compared with the whole model."""

import torch


def logits(model, x):
    output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_replays(chain, x, cuts=None):
    """Prefix, then suffix on the feature: the model's logits, bit for bit, at every cut."""
    model = chain.model.eval()
    with torch.no_grad():
        expected = logits(model, x)
        for cut in range(len(chain) + 1) if cuts is None else cuts:
            feature = chain.prefix({chain.main_input: x}, cut)
            with chain.replay(cut):
                assert torch.equal(logits(model, feature), expected), f"cut {cut}"
        assert torch.equal(logits(model, x), expected)
