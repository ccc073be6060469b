"""A head on its base is the model that was trained, bit for bit, whatever the family."""

import pytest
import safetensors.torch
import torch
from support.heads import FAMILIES, behind, load_base, logits, make_base, probe_of, trained

from hf_freezecache import load_head, save_head

CUT = 3


@pytest.mark.parametrize("family", FAMILIES)
def test_head_on_its_base_is_the_trained_model_bit_for_bit(family, tmp_path):
    base = make_base(family, tmp_path / "base")
    model = trained(base, CUT)
    save_head(model, tmp_path / "head", cut=CUT, probe=probe_of(model))
    loaded = load_head(tmp_path / "head", base=base)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(load_base(base)), logits(model))
    assert loaded.config.id2label == model.config.id2label
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    content = safetensors.torch.load_file(tmp_path / "head" / "head.safetensors")
    assert {*behind(model, CUT, probe_of(model))} <= {*content} < {*expected}
