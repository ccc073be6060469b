"""Heads of trainers: the cut, the blocks and what was trained are those of the training."""

import json

import pytest
import torch
from support.heads import load_base, logits, make_base, named
from support.helpers import make_args, manual, messages, pixel_dataset, run
from support.texts import sentences, tiny_bert, tiny_tokenizer
from transformers import DataCollatorWithPadding, Trainer

from hf_freezecache import FreezeCacheTrainer, HeadError, load_head, save_head

FAMILIES = {"vit": 16, "resnet": 32, "mobilenet": 32}


def parts_of(folder):
    parts = json.loads((folder / "head_config.json").read_text())["parts"]
    return {part["name"]: part["included"] for part in parts}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_head_of_a_replayed_training_is_the_trained_model(family, codec, tmp_path):
    base = make_base(family, tmp_path / "base")
    data = pixel_dataset(16, FAMILIES[family])
    trainer = run(load_base(base), data, tmp_path / "run", manual("0:3", codec=codec), num_train_epochs=2)
    assert trainer.freeze_status().replaying
    folder = save_head(trainer, tmp_path / "head")
    assert len(parts_of(folder)) == 3 and not any(parts_of(folder).values())
    loaded = load_head(folder, base=base)
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_blocks_of_live_epochs_are_part_of_the_head(tmp_path, caplog):
    base = make_base("vit", tmp_path / "base")
    trainer = run(load_base(base), pixel_dataset(16), tmp_path / "run", manual("0:1,1:3"), num_train_epochs=2)
    with pytest.raises(HeadError, match="vit.layers.0, vit.layers.1 differ from the base: they were trained before"):
        save_head(trainer, tmp_path / "head", include_prefix=False)
    folder = save_head(trainer, tmp_path / "head")
    assert parts_of(folder) == {"vit.embeddings": False, "vit.layers.0": True, "vit.layers.1": True}
    assert torch.equal(logits(load_head(folder, base=base)), logits(trainer.model))


def test_head_of_a_resumed_training_is_the_trained_model(tmp_path):
    base = make_base("resnet", tmp_path / "base")
    data, config = pixel_dataset(16, 32), manual("1:3")
    run(load_base(base), data, tmp_path / "run", config, num_train_epochs=3, save_strategy="epoch", max_steps=4)
    trainer = run(
        load_base(base), data, tmp_path / "run", config, resume=True, num_train_epochs=3, save_strategy="epoch"
    )
    folder = save_head(trainer, tmp_path / "head")
    assert torch.equal(logits(load_head(folder, base=base)), logits(trainer.model))


def test_training_without_a_base_saves_what_was_trained(tmp_path, caplog):
    """The model was made of a configuration: the ledger tells which blocks a step has changed."""
    model = load_base(make_base("vit", tmp_path / "base"))
    model.config._name_or_path = ""
    first = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = run(model, pixel_dataset(16), tmp_path / "run", manual("0:1,1:3"), num_train_epochs=2)
    folder = save_head(trainer, tmp_path / "head")
    assert parts_of(folder) == {"vit.embeddings": False, "vit.layers.0": True, "vit.layers.1": True}
    assert "and the model does not tell what it was loaded from" in messages(caplog)
    with pytest.raises(HeadError, match="pass the folder, id or model"):
        load_head(folder)
    mine = load_base(tmp_path / "base")
    mine.load_state_dict(first)
    assert torch.equal(logits(load_head(folder, base=mine)), logits(trainer.model))


def test_another_cut_than_the_trainings_serves(tmp_path):
    base = make_base("vit", tmp_path / "base")
    trainer = run(load_base(base), pixel_dataset(16), tmp_path / "run", manual("0:2"), num_train_epochs=1)
    for cut in (1, 2, 4):
        folder = save_head(trainer, tmp_path / f"head-{cut}", cut=cut)
        assert parts_of(folder) == {name: number >= 2 for number, name in enumerate(trainer.find_chain().names[:cut])}
        assert torch.equal(logits(load_head(folder, base=base)), logits(trainer.model))


def test_texts_keep_their_tokenizer(tmp_path):
    base = tiny_bert(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    data = [{**tokenizer(text), "labels": row % 2} for row, text in enumerate(sentences(16))]
    trainer = FreezeCacheTrainer(
        model=load_base(base),
        args=make_args(tmp_path / "run", num_train_epochs=2),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        freeze_cache=manual("0:3"),
    )
    trainer.train()
    folder = save_head(trainer, tmp_path / "head")
    loaded = load_head(folder, base=base)
    assert torch.equal(logits(loaded), logits(trainer.model))
    again = type(tokenizer).from_pretrained(folder)
    assert again("my card is lost") == tokenizer("my card is lost")
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_plain_trainer_needs_a_cut(tmp_path):
    base = make_base("vit", tmp_path / "base")
    trainer = Trainer(model=load_base(base), args=make_args(tmp_path / "run"), train_dataset=pixel_dataset(16))
    with pytest.raises(HeadError, match="cut=…"):
        save_head(trainer, tmp_path / "head")
    folder = save_head(trainer, tmp_path / "head", cut=3)
    assert torch.equal(logits(load_head(folder, base=base)), logits(trainer.model))


@pytest.mark.parametrize(
    "settings", [{"policy": "none"}, {"policy": "linear", "freeze_start": 1.0, "freeze_end": 1.0}]
)
def test_training_that_froze_nothing_needs_a_cut(settings, tmp_path):
    base = make_base("vit", tmp_path / "base")
    trainer = run(load_base(base), pixel_dataset(16), tmp_path / "run", settings, num_train_epochs=1)
    with pytest.raises(HeadError, match="nothing was frozen in this training: say how many"):
        save_head(trainer, tmp_path / "head")
    folder = save_head(trainer, tmp_path / "head", cut=2)
    assert all(parts_of(folder).values())
    assert torch.equal(logits(load_head(folder, base=base)), logits(trainer.model))


def test_mixed_precision_keeps_the_weights(tmp_path):
    base = make_base("vit", tmp_path / "base")
    trainer = run(load_base(base), pixel_dataset(16), tmp_path / "run", manual("0:2"), num_train_epochs=1, bf16=True)
    loaded = load_head(save_head(trainer, tmp_path / "head"), base=base)
    assert {name: value.dtype for name, value in named(loaded).items()} == {
        name: torch.float32 for name in named(loaded)
    }
    assert all(torch.equal(value, named(trainer.model)[name]) for name, value in named(loaded).items())
