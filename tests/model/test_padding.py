"""Which padding changes no feature of a token, and what reads what is at padding."""

import subprocess
import sys

import pytest
import torch
from support.token_rows import (
    Choices,
    Pad,
    PadChoices,
    Texts,
    bert,
    bert_of_choices,
    bert_of_questions,
    bert_of_tokens,
    gpt2,
    llama,
    xlnet,
)

from hf_freezecache import BlockChain


def chain_and_batch(make, label="class", side="right", labels=False):
    batch = Pad(side)([*Texts(8, label=label)])
    inputs = {name: value for name, value in batch.items() if labels or name in ("input_ids", "attention_mask")}
    return BlockChain.from_model(make().eval(), probe=inputs), inputs


@pytest.mark.parametrize(
    ("make", "sides"),
    [(bert, {"right"}), (gpt2, {"right"}), (llama, {"right", "left"}), (xlnet, {"right", "left"})],
)
def test_sides_on_which_padding_changes_nothing(make, sides):
    """Positions are counted from the left by tables; rotations, and distances, do not notice padding there."""
    chain, batch = chain_and_batch(make)
    assert chain.padding.ignored(2) == sides
    layout = chain.stored_layout(2)
    assert layout.is_token and layout.shape == (32,)
    assert chain.layout(2).shape == (batch["input_ids"].shape[1], 32)


def test_features_of_tokens_do_not_know_the_width_of_their_batch():
    chain, batch = chain_and_batch(bert)
    wide = chain.prefix(batch, 2)
    narrow = chain.prefix(Pad()([Texts(8)[0], Texts(8)[1]]), 2)
    length = len(Texts(8)[0]["input_ids"])
    torch.testing.assert_close(wide[0, :length], narrow[0, :length])


@pytest.mark.parametrize("make", [bert, bert_of_tokens, gpt2, llama])
def test_suffix_on_texts_of_another_width_is_the_models(make):
    """Outputs of skipped blocks seem as wide as the batch, not as the recorded one."""
    chain, _ = chain_and_batch(make)
    batch = Pad()([*Texts(8, 20, 30)])
    batch.pop("labels")
    with torch.no_grad():
        whole, replayed = chain.model(**batch), chain.suffix(chain.prefix(batch, 2), batch, 2)
    assert torch.equal(whole.logits, replayed.logits)


@pytest.mark.parametrize("side", ["right", "left"])
def test_features_of_choices_are_those_of_their_tokens(side):
    batch = PadChoices(side)([*Choices(6)])
    chain = BlockChain.from_model(bert_of_choices().eval(), probe=batch)
    assert chain.padding.ignored(2) == {"right"}
    chain.prove(batch, 2)
    if side == "left":
        assert "padded on the left" in chain.padding.why_kept(2)
        return
    assert chain.padding.why_kept(2) is None and chain.stored_layout(2).shape == (32,)
    wider = PadChoices(width=30)([*Choices(6)])
    features = chain.prefix(wider, 2)
    assert features.shape == (6, 3 * 30, 32)
    with torch.no_grad():
        assert torch.equal(chain.suffix(features, wider, 2).logits, chain.model(**wider).logits)


@pytest.mark.parametrize(("make", "label"), [(xlnet, "class"), (bert_of_questions, "span")])
def test_a_head_that_reads_what_is_at_padding_keeps_it(make, label):
    """XLNet's summary is the last position; the scores of an answer's ends are compared over all positions."""
    chain, batch = chain_and_batch(make, label, labels=True)
    chain.prove(batch, 2)
    assert chain.padding.ignored(2) == set() and "reads what is at padding" in chain.padding.why_kept(2)
    assert chain.stored_layout(2).shape == (batch["input_ids"].shape[1], 32)
    with torch.no_grad():
        assert torch.equal(chain.suffix(chain.prefix(batch, 2), batch, 2)[0], chain.model(**batch)[0])


def test_padding_on_a_side_that_counts_is_kept():
    chain, batch = chain_and_batch(gpt2, side="left")
    chain.prove(batch, 2)
    assert "padded on the left" in chain.padding.why_kept(2) and not chain.stored_layout(2).is_token


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch has the older setting alone")
@pytest.mark.parametrize(
    ("precision", "larger"), [pytest.param("ieee", False, marks=pytest.mark.slow), ("tf32", True)]
)
def test_precision_is_read_however_it_was_set(precision, larger):
    """`TrainingArguments(tf32=...)` sets it so; a process of its own, as the older setting cannot be read after it."""
    code = (
        f"import torch; torch.backends.fp32_precision = {precision!r}\n"
        "from hf_freezecache.model.rounding import tolerance_of\n"
        "device = torch.device('cuda')\n"
        "print(tolerance_of(torch.float32, device, False) > tolerance_of(torch.float32, torch.device('cpu'), False))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == str(larger), found.stderr


def test_rounding_under_autocast_is_that_of_the_run_not_of_the_place_that_asks():
    """accelerate puts autocast into `forward`, and features may be of single precision all the same."""
    chain, inputs = chain_and_batch(bert)
    with torch.no_grad():
        chain.capture(inputs, 2)
        exact = chain.own_trace().tolerance(torch.float32, torch.device("cpu"))
        chain.model.forward = torch.autocast("cpu", torch.bfloat16)(chain.model.forward)
        assert chain.capture(inputs, 2).dtype == torch.float32
    assert exact < 1e-3 < 1e-2 < chain.own_trace().tolerance(torch.float32, torch.device("cpu"))
