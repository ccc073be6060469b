"""Options of `TrainingArguments` and kinds of models that meet the cache in a place of their own."""

import contextlib
import importlib.util
import json
import logging

import pytest
import safetensors.torch
import torch
import transformers
from support.helpers import losses, make_args, manual, pixel_dataset, run, tiny_vit
from transformers import Seq2SeqTrainingArguments, Trainer

from hf_freezecache import FreezeCacheTrainer

NEEDS_PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


def with_lora():
    """Adapters in every layer; embeddings stay as they are, the classifier is trained."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))


@NEEDS_PEFT
def test_peft_cached_is_freeze_only_and_trains_as_plain_before_the_freeze(tmp_path):
    plain = run(with_lora(), pixel_dataset(), tmp_path / "plain", trainer_class=Trainer)
    frozen = run(with_lora(), pixel_dataset(), tmp_path / "frozen", manual("1:2,2:3", cache="never"))
    cached = run(with_lora(), pixel_dataset(), tmp_path / "cached", manual("1:2,2:3", codec="fp32"))
    assert cached.freeze_status().replaying and cached.freeze_status().cut == 3
    assert losses(cached) == losses(frozen)
    assert losses(cached)[:4] == losses(plain)[:4] and losses(cached) != losses(plain)


@NEEDS_PEFT
def test_peft_resume_from_a_replay_epoch_equals_the_uninterrupted_training(tmp_path):
    """The checkpoint holds adapters only: `Trainer` loads them, and what was frozen is frozen again."""
    whole = run(with_lora(), pixel_dataset(), tmp_path, manual("1:2", codec="fp32"), save_strategy="epoch")
    assert (tmp_path / "checkpoint-12" / "adapter_model.safetensors").is_file()
    resumed = run(
        with_lora(),
        pixel_dataset(),
        tmp_path,
        manual("1:2", codec="fp32"),
        resume=str(tmp_path / "checkpoint-12"),
        save_strategy="epoch",
    )
    assert resumed.freeze_status().replaying and losses(resumed) == losses(whole)
    live = {name for name, parameter in resumed.model.named_parameters() if parameter.requires_grad}
    assert live and not any(".layers.0." in name for name in live)


def test_predict_with_generate_evaluates_on_images_and_says_so(tmp_path, caplog):
    args = Seq2SeqTrainingArguments(
        **{**make_args(tmp_path).to_dict(), "predict_with_generate": True, "eval_strategy": "epoch"}
    )
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=args,
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(),
        freeze_cache=manual("1:2", cache_eval=True),
    )
    trainer.train()
    messages = [record.getMessage() for record in caplog.records]
    assert sum("run on samples (predict_with_generate)" in message for message in messages) == 1
    assert trainer.freeze_status().replaying and len(list(tmp_path.rglob("manifest.json"))) == 1
    assert not any("_cached" in key for entry in trainer.state.log_history for key in entry)


def test_tokens_of_replay_epochs_count_as_those_of_live_ones(tmp_path, caplog):
    settings = dict(num_train_epochs=3, include_num_input_tokens_seen="all")
    plain = run(tiny_vit(), pixel_dataset(), tmp_path / "plain", trainer_class=Trainer, **settings)
    ours = run(tiny_vit(), pixel_dataset(), tmp_path / "ours", manual("1:2"), **settings)
    pixels = 32 * 3 * 16 * 16
    assert (plain.state.num_input_tokens_seen, ours.state.num_input_tokens_seen) == (3 * pixels, 3 * pixels)
    assert ours.freeze_status().replaying
    assert not any("number of tokens" in record.getMessage() for record in caplog.records)


def test_fp16_cached_is_freeze_only(tmp_path):
    plain = run(tiny_vit(), pixel_dataset(), tmp_path / "plain", trainer_class=Trainer, fp16=True)
    frozen = run(tiny_vit(), pixel_dataset(), tmp_path / "frozen", manual("1:2", cache="never"), fp16=True)
    cached = run(tiny_vit(), pixel_dataset(), tmp_path / "cached", manual("1:2", codec="fp32"), fp16=True)
    assert cached.freeze_status().replaying
    assert losses(cached) == losses(frozen) and losses(cached)[:4] == losses(plain)[:4]


def test_resume_from_a_checkpoint_of_bin_shards_with_an_index_is_exact(tmp_path):
    whole = run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2"), save_strategy="epoch")
    checkpoint = tmp_path / "checkpoint-8"
    tensors = list(safetensors.torch.load_file(checkpoint / "model.safetensors").items())
    (checkpoint / "model.safetensors").unlink()
    places = {}
    for number, part in enumerate((tensors[:20], tensors[20:]), start=1):
        name = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save(dict(part), checkpoint / name)
        places.update(dict.fromkeys(dict(part), name))
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    resumed = run(
        tiny_vit(seed=1), pixel_dataset(), tmp_path, manual("1:2"), resume=str(checkpoint), save_strategy="epoch"
    )
    assert losses(resumed) == losses(whole)


@pytest.fixture
def levels():
    """A trainer sets the level of Transformers and of this package for the whole process: both are restored."""
    package, verbosity = logging.getLogger("hf_freezecache"), transformers.logging.get_verbosity()
    level = package.level
    package.setLevel(logging.NOTSET)  # as in a new process: tests before may have asked for messages
    transformers.logging.set_verbosity_warning()
    yield
    transformers.logging.set_verbosity(verbosity)
    package.setLevel(level)


@contextlib.contextmanager
def logging_not_set_up():
    """As in a script that has not set up logging: neither pytest's handlers nor those of earlier trainers."""
    root, package = logging.getLogger(), logging.getLogger("hf_freezecache")
    handlers, own = root.handlers, package.handlers
    root.handlers, package.handlers = [], []
    try:
        yield
    finally:
        root.handlers, package.handlers = handlers, own


@pytest.mark.parametrize(("level", "shown"), [("info", True), ("passive", False), ("warning", False)])
def test_messages_of_level_info_are_shown_where_trainer_shows_its_own(level, shown, levels, tmp_path, capsys):
    with logging_not_set_up():
        run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2"), num_train_epochs=2, log_level=level)
    assert ("froze 2 of 4 blocks" in capsys.readouterr().err) == shown


def test_messages_are_shown_once_though_several_trainers_are_made(levels, tmp_path, capsys):
    with logging_not_set_up():
        for name in ("first", "second"):
            capsys.readouterr()
            run(tiny_vit(), pixel_dataset(), tmp_path / name, manual("1:2"), num_train_epochs=2, log_level="info")
    assert capsys.readouterr().err.count("froze 2 of 4 blocks") == 1


def test_handlers_of_the_user_are_not_doubled(levels, tmp_path, caplog):
    handlers = list(logging.getLogger("hf_freezecache").handlers)
    run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2"), num_train_epochs=2, log_level="info")
    assert logging.getLogger("hf_freezecache").handlers == handlers
    assert sum("froze 2 of 4 blocks" in record.getMessage() for record in caplog.records) == 1


def test_a_trainer_hides_no_messages_that_were_asked_for(levels, tmp_path):
    package = logging.getLogger("hf_freezecache")
    for before, after in ((logging.DEBUG, logging.DEBUG), (logging.ERROR, logging.INFO)):
        package.setLevel(before)
        run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2"), num_train_epochs=1, log_level="info")
        assert package.level == after
