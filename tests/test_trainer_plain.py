"""Where nothing is frozen the trainer is `Trainer`, and what cannot be frozen is said before anything is done."""

import pytest
import torch
from support.helpers import CLASSES, losses, make_args, manual, messages, pixel_dataset, run, tiny_vit
from support.pretrained import settle
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer


class Counted(torch.utils.data.Dataset):
    """Counts what is drawn."""

    def __init__(self):
        self.rows, self.draws = pixel_dataset(), 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.draws += 1
        return self.rows[index]


class Unknown(nn.Module):
    """Not declared; counts its runs."""

    def __init__(self):
        super().__init__()
        self.layer, self.runs = nn.Linear(768, CLASSES), 0

    def forward(self, pixel_values, labels=None):
        self.runs += 1
        logits = self.layer(pixel_values.flatten(1))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


def test_fallback_leaves_nothing_and_draws_nothing_that_is_seen(tmp_path):
    """A model that nobody declared is run thrice before the training, to find its blocks."""
    plain, fallen = Counted(), Counted()
    torch.manual_seed(0)
    trainer = run(Unknown(), plain, tmp_path / "plain", trainer_class=Trainer)
    torch.manual_seed(0)
    ours = run(Unknown(), fallen, tmp_path / "ours")
    assert fallen.draws == plain.draws and ours.model.runs <= trainer.model.runs + 3
    assert losses(ours) == losses(trainer)
    assert not (tmp_path / "ours" / "_freeze_cache").exists()
    assert "plain training: Unknown cannot be cut anywhere" in str(ours.freeze_cache_report())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "manual", "freeze_points": "1:9"}, "asks for cut 9, but the model has 4 blocks"),
        ({"policy": "manual", "freeze_points": "1:2", "blocks": ["nothing"]}, "no module 'nothing'"),
    ],
)
def test_settings_are_checked_before_data_is_touched(settings, words, tmp_path):
    dataset = Counted()
    with pytest.raises(ValueError, match=words):
        run(tiny_vit(), dataset, tmp_path, FreezeCacheConfig(**settings))
    assert dataset.draws == 0 and not (tmp_path / "_freeze_cache").exists()


def test_nothing_left_to_train_is_refused_at_the_start(tmp_path):
    model = tiny_vit()
    for parameter in [*model.classifier.parameters(), *model.vit.layernorm.parameters()]:
        parameter.requires_grad_(False)
    trainer = FreezeCacheTrainer(
        model=model, args=make_args(tmp_path), train_dataset=pixel_dataset(), freeze_cache=manual("3:4")
    )
    with pytest.raises(ValueError, match="nothing is left to train"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_report_and_status_of_policy_none_say_that_it_is_plain(tmp_path):
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, FreezeCacheConfig(policy="none"))
    assert str(trainer.freeze_cache_report()) == "nothing was booked: plain training: policy='none'"
    trainer.model = None  # as a search for hyperparameters leaves it
    assert trainer.freeze_status().trainable_parameters == 0


class OursFirst(FreezeCacheTrainer, Seq2SeqTrainer):
    pass


class TheirsFirst(Seq2SeqTrainer, FreezeCacheTrainer):
    pass


class Deeper(TheirsFirst):
    def __init__(self, *args, mine=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.mine = mine


@pytest.mark.parametrize("cls", [OursFirst, TheirsFirst, Deeper])
@pytest.mark.parametrize("points", [None, "1:2"])
def test_seq2seq_trainer_mixes_in_both_orders(cls, points, tmp_path):
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, num_train_epochs=2
    )
    config = FreezeCacheConfig(policy="none") if points is None else manual(points)
    trainer = cls(
        model=tiny_vit(), args=args, train_dataset=pixel_dataset(), eval_dataset=pixel_dataset(8), freeze_cache=config
    )
    trainer.train()
    assert trainer.freeze_status().cut == (0 if points is None else 2)
    assert trainer.freeze_status().replaying == (points is not None)
    assert trainer.evaluate(max_new_tokens=3)["eval_loss"] > 0
    assert len(trainer.predict(pixel_dataset(8), max_new_tokens=3).predictions) == 8
    assert cls(model=tiny_vit(), args=args).freeze_status().cut == 0


class KeepsOptimizer(FreezeCacheTrainer):
    """Makes its optimizer alone."""

    def create_optimizer(self):
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2, momentum=0.9)
        return self.optimizer


def test_own_optimizer_resumes_frozen(tmp_path):
    whole, resumed = (
        KeepsOptimizer(
            model=tiny_vit(),
            args=make_args(tmp_path / name, save_strategy="epoch"),
            train_dataset=pixel_dataset(),
            freeze_cache=manual("1:2", codec="fp32"),
        )
        for name in ("whole", "whole")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert resumed.freeze_status().cut == 2
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


class SavesHead(FreezeCacheTrainer):
    def _save(self, output_dir=None, state_dict=None):
        head = {name: value for name, value in self.model.state_dict().items() if "classifier" in name}
        super()._save(output_dir, head)


@pytest.mark.parametrize("config", [None, manual("1:2")])
def test_best_model_of_a_part_is_loaded_as_trainer_does(config, tmp_path, caplog):
    trainer = SavesHead(
        model=settle(tiny_vit()),
        args=make_args(tmp_path, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True),
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(8),
        freeze_cache=config,
    )
    trainer.train()
    assert trainer.state.global_step == 16
    assert "`SavesHead` saves checkpoints in its own way" in messages(caplog)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


class Queue(nn.Module):
    """Loads a buffer that has grown."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(768, 8), nn.Linear(8, CLASSES)
        self.register_buffer("seen", torch.empty(0))

    def load_state_dict(self, state_dict, strict=True, assign=False):
        self.seen = state_dict["seen"].clone()
        return super().load_state_dict(state_dict, strict=strict)

    def forward(self, pixel_values, labels=None):
        if self.training:
            self.seen = torch.cat([self.seen, labels.float()])
        logits = self.head(self.stem(pixel_values.flatten(1)))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("config", [None, FreezeCacheConfig(policy="none")])
def test_model_that_loads_in_its_own_way_resumes(config, tmp_path):
    run(Queue(), pixel_dataset(), tmp_path, config, save_strategy="epoch")
    resumed = run(Queue(), pixel_dataset(), tmp_path, config, resume=str(tmp_path / "checkpoint-8"))
    assert len(resumed.model.seen) == 128


@pytest.mark.parametrize("counting", ["all", "non_padding"])
def test_replay_epochs_count_tokens_as_live_ones(counting, tmp_path):
    class Padded(torch.utils.data.Dataset):
        rows = pixel_dataset()

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return {**self.rows[index], "attention_mask": torch.arange(8) < index % 8}

    settings = dict(include_num_input_tokens_seen=counting, remove_unused_columns=False)

    class TakesForImageClassification(type(tiny_vit())):
        def forward(self, pixel_values, labels=None, attention_mask=None):
            return super().forward(pixel_values, labels=labels)

    def model():
        return TakesForImageClassification(tiny_vit().config)

    plain = run(model(), Padded(), tmp_path / "plain", trainer_class=Trainer, **settings)
    ours = run(model(), Padded(), tmp_path / "ours", manual("1:2"), **settings)
    assert ours.freeze_status().replaying
    assert ours.state.num_input_tokens_seen == plain.state.num_input_tokens_seen > 0


class Tied(nn.Module):
    """A head that reads the stem's weights."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Linear(768, CLASSES), nn.Linear(CLASSES, CLASSES)

    def forward(self, pixel_values, labels=None):
        x = self.block(self.stem(pixel_values.flatten(1)))
        logits = x @ self.stem.weight[:, :CLASSES]
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


def test_parameter_of_stem_and_head_is_refused(tmp_path):
    config = manual("1:1", blocks=["stem", "block"])
    with pytest.raises(ValueError, match="'stem.weight' of Tied is used by 'stem' and by 'the head'"):
        run(Tied(), pixel_dataset(), tmp_path, config)


@pytest.mark.parametrize("how", ["wrapped", "in_place", "block"])
def test_compiled_model_trains_as_the_uncompiled_one(how, tmp_path, caplog):
    torch._dynamo.reset()
    model = tiny_vit(hidden_dropout_prob=0.0)
    backend = {"backend": "eager"}
    if how == "wrapped":
        model = torch.compile(model, **backend)
    elif how == "in_place":
        model.compile(**backend)
    else:
        model.vit.layers[0].compile(**backend)
    settings = {"remove_unused_columns": False}  # `Trainer` cannot read the arguments of a wrapped model
    ours = run(model, pixel_dataset(), tmp_path / "ours", manual("1:2", codec="fp32"), **settings)
    plain = run(tiny_vit(hidden_dropout_prob=0.0), pixel_dataset(), tmp_path / "plain", manual("1:2", codec="fp32"))
    assert ours.freeze_status().replaying and "live epochs run compiled" in messages(caplog)
    trained = ours.model.state_dict().values()
    for (name, expected), found in zip(plain.model.state_dict().items(), trained, strict=True):
        assert torch.allclose(expected, found, atol=1e-6), name


def test_trials_share_one_budget_and_what_is_equal(tmp_path):
    stores = tmp_path / "_freeze_cache"
    sizes, seen = [], []

    class Watching(FreezeCacheTrainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            folders = sorted(path for path in stores.glob("*") if path.is_dir())
            sizes.append(sum(file.stat().st_size for path in folders for file in path.rglob("*") if file.is_file()))
            return super()._maybe_log_save_evaluate(*args, **kwargs)

    trainer = Watching(
        model_init=lambda: tiny_vit(),
        args=make_args(tmp_path, eval_strategy="epoch"),
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(8),
        freeze_cache=manual("1:2", cache_budget="60KB"),
    )
    rates = iter([1e-3, 1e-4, 1e-4])

    def next_rate(trial):
        seen.append(sorted(path.name for path in stores.iterdir()) if stores.exists() else [])
        return {"learning_rate": trial.suggest_categorical("learning_rate", [next(rates)])}

    for _ in range(3):
        trainer.hyperparameter_search(hp_space=next_rate, n_trials=1, backend="optuna")
    last = sorted(path.name for path in stores.iterdir())
    assert max(sizes) <= 60_000
    assert len(seen[1]) == len(seen[2]) == len(last) == 1
    assert seen[1] != seen[2] == last


def test_status_after_a_search_without_freezing_is_plain(tmp_path):
    trainer = FreezeCacheTrainer(
        model_init=lambda: tiny_vit(),
        args=make_args(tmp_path, eval_strategy="epoch", num_train_epochs=1),
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(8),
        freeze_cache=FreezeCacheConfig(policy="none"),
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
        n_trials=1,
        backend="optuna",
    )
    assert trainer.freeze_status().cut == 0 and not trainer.freeze_status().replaying


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_code_that_rounds_otherwise_when_compiled_trains_on_the_cache(backend, bf16, tmp_path):
    torch._dynamo.reset()
    config = manual("1:2", codec="fp32", cache="always", head_start_epochs=0)
    settings = {"num_train_epochs": 2, "bf16": bf16, "remove_unused_columns": False}
    model = torch.compile(tiny_vit(), backend=backend)
    compiled = run(model, pixel_dataset(16), tmp_path / "compiled", config, **settings)
    assert compiled.freeze_status().replaying
    uncompiled = run(tiny_vit(), pixel_dataset(16), tmp_path / "plain", config, **settings)
    for found, expected in zip(losses(compiled), losses(uncompiled), strict=True):
        assert found == pytest.approx(expected, rel=0.02)
