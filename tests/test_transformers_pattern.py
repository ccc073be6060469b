"""The trainings that Transformers tests its `Trainer` with, in our words, with the class switched.

Each scenario is run by two trainers and returns what they must agree on: `Trainer` against `policy="none"`, where
nothing is frozen; the defaults against the same freezing without a cache; cached features in full precision likewise.
"""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.regression import (
    BLOCKS,
    Classifier,
    CountingModel,
    Diary,
    DictModel,
    Flags,
    Regression,
    RegressionModel,
    RegressionStream,
    Sequences,
    Side,
    TwoLabels,
    accuracy,
    assert_same,
    outcome,
    own_optimizers,
    pretrained,
    without_times,
)
from torch.utils.data import SequentialSampler, WeightedRandomSampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerState,
    default_data_collator,
    get_constant_schedule_with_warmup,
)
from transformers.integrations import is_optuna_available

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer

pytestmark = pytest.mark.slow


# Training


def reproducible(side):
    first, second, other = (side.train(seed=seed, model=RegressionModel(0.5, 1.0)) for seed in (42, 42, 314))
    assert_same(outcome(first), outcome(second))
    assert outcome(first)["log"] != outcome(other)["log"]
    return outcome(first), outcome(other)


def schedules(side):
    kinds = {
        "linear": {"warmup_steps": 5},
        "cosine": {"warmup_steps": 0.1},
        "constant": {},
        "constant_with_warmup": {"warmup_steps": 4},
        "polynomial": {"lr_scheduler_kwargs": {"power": 2.0}},
        "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-3}},
        "reduce_lr_on_plateau": {"eval_strategy": "epoch", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.2}},
    }
    return [outcome(side.train(lr_scheduler_type=kind, **settings)) for kind, settings in kinds.items()]


def optimizers_passed_in(side):
    model = RegressionModel()
    first = side.train(model, optimizers=own_optimizers(model))
    second = side.train(optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"lr": 0.01}))
    model = RegressionModel()
    third = side.train(
        model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None), lr_scheduler_type="cosine"
    )
    return outcome(first), outcome(second), outcome(third)


def optimizers_of_a_subclass(side):
    class Own(side.base):
        def create_optimizer_and_scheduler(self, num_training_steps):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            self.lr_scheduler = get_constant_schedule_with_warmup(self.optimizer, num_training_steps // 4)

    class Scheduler(side.base):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7)
            return self.lr_scheduler

    return [outcome(side.train(base=base)) for base in (Own, Scheduler)]


def optimizers_by_name(side):
    return [
        outcome(side.train(optim=name, weight_decay=0.1)) for name in ("adamw_torch", "sgd", "adafactor", "rmsprop")
    ]


def accumulation(side):
    return [
        outcome(side.train(gradient_accumulation_steps=steps, per_device_train_batch_size=4))
        for steps in (1, 2, 3, 16)
    ]


def steps_at_most(side):
    trainings = [
        {"max_steps": 10},
        {"max_steps": 40},
        {"num_train_epochs": 1.5},
        {"max_steps": 10, "num_train_epochs": 1},
    ]
    return [outcome(side.train(**settings)) for settings in trainings]


def clipping_and_decay(side):
    return [outcome(side.train(max_grad_norm=norm, weight_decay=0.5)) for norm in (0.0, 0.1)]


def bfloat16(side):
    return outcome(side.train(bf16=True))


def losses_that_are_nan(side):
    class Fails(side.base):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            return loss * float("nan") if self.state.global_step % 3 == 2 else loss

    return [
        outcome(side.train(base=Fails, logging_nan_inf_filter=wanted, logging_steps=4)) for wanted in (True, False)
    ]


def label_smoothing(side):
    data = Regression()
    rows = Dataset.from_dict({"input_x": data.x, "labels": (data.y["labels"] > 3).astype(np.int64)}).with_format(
        "torch"
    )
    settings = dict(train_dataset=rows, eval_dataset=rows, label_smoothing_factor=0.1)
    trainer = side.train(Classifier(), **settings)
    return outcome(trainer), without_times(trainer.evaluate())


def labels_of_all_accumulated_batches(side):
    def loss(outputs, labels, num_items_in_batch=None):
        total = ((outputs[0] - labels) ** 2).sum()
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    settings = dict(gradient_accumulation_steps=3, per_device_train_batch_size=5)
    first = side.train(CountingModel(), **settings)
    second = side.train(RegressionModel(), compute_loss_func=loss, **settings)
    return outcome(first), outcome(second)


def several_label_names(side):
    names = ("labels_1", "labels_2")
    data, other = Regression(label_names=names), Regression(20, seed=9, label_names=names)
    trainer = side.train(TwoLabels(), train_dataset=data, eval_dataset=other, label_names=list(names))
    return outcome(trainer), without_times(trainer.evaluate()), trainer.predict(other).label_ids


# Models and data


def models(side):
    kinds = (RegressionModel, DictModel)
    found = [outcome(side.train(kind(double=double))) for kind in kinds for double in (False, True)]
    return found, [outcome(side.train(pretrained(a=1.5, double=double))) for double in (False, True)]


def models_that_are_made_by_the_trainer(side):
    torch.manual_seed(1)
    trainer = side.train(model_init=lambda: RegressionModel(float(torch.rand(()))))
    first = outcome(trainer)
    trainer.train()
    return first, outcome(trainer)


def data_sets_with_more_columns(side):
    data = Regression()
    rows = Dataset.from_dict({"input_x": data.x, "labels": data.y["labels"], "extra": list(map(str, range(64)))})
    return outcome(side.train(train_dataset=rows.with_format("torch"), data_collator=default_data_collator))


def samplers(side):
    class Weighted(side.base):
        def _get_train_sampler(self, train_dataset=None):
            weights = [1.0 + row % 3 for row in range(64)]
            return WeightedRandomSampler(weights, 40, generator=torch.Generator().manual_seed(2))

    settings = [{"base": Weighted}, {"train_sampling_strategy": "sequential"}, {"data_seed": 5}]
    return [
        outcome(side.train(**own))
        for own in [*settings, {"dataloader_drop_last": True, "per_device_train_batch_size": 7}]
    ]


def grouped_by_length(side):
    data = Regression()
    lengths = [int(row % 9) + 1 for row in range(64)]
    rows = Dataset.from_dict({"input_x": data.x, "labels": data.y["labels"], "length": lengths}).with_format("torch")
    settings = dict(train_sampling_strategy="group_by_length", remove_unused_columns=False)
    return outcome(side.train(train_dataset=rows, **settings))


def loader_processes(side):
    return [
        outcome(side.train(dataloader_num_workers=2, dataloader_persistent_workers=persistent))
        for persistent in (False, True)
    ]


def dynamic_shapes_of_an_evaluation(side):
    trainer = side.trainer(eval_dataset=Sequences(), per_device_eval_batch_size=8)
    return without_times(trainer.evaluate()), trainer.predict(Sequences()).predictions


# Evaluation


def evaluations_and_predictions(side):
    trainer = side.train(RegressionModel(1.5, 2.5), compute_metrics=accuracy, eval_strategy="steps", eval_steps=5)
    without = side.train(RegressionModel(1.5, 2.5), eval_strategy="epoch", eval_on_start=True, eval_delay=1)
    data = Regression(66, seed=3)
    answers = [tuple(one.predict(data)[:2]) for one in (trainer, without)]
    metrics = [without_times(one.evaluate(data)) for one in (trainer, without)]
    return outcome(trainer), outcome(without), answers, metrics, without_times(trainer.predict(data).metrics)


def evaluations_in_batches(side):
    def batchwise(prediction, compute_result):
        metrics = accuracy(prediction)
        return {name: float(value) for name, value in metrics.items()} if compute_result else {}

    def halved(logits, labels):
        return logits / 2

    first = side.train(compute_metrics=batchwise, batch_eval_metrics=True, eval_strategy="epoch")
    second = side.train(compute_metrics=accuracy, preprocess_logits_for_metrics=halved, eval_accumulation_steps=1)
    third = side.train(eval_dataset={"a": Regression(9), "b": Regression(11, seed=8)}, eval_strategy="epoch")
    return outcome(first), without_times(second.evaluate()), second.predict(Regression(10)).predictions, outcome(third)


def ignored_keys(side):
    trainer = side.trainer(DictModel(double=True), eval_strategy="epoch")
    trainer.train(ignore_keys_for_eval=["output_2"])
    data = Regression(10)
    both, one = trainer.predict(data), trainer.predict(data, ignore_keys=["output_2"])
    assert isinstance(both.predictions, tuple) and isinstance(one.predictions, np.ndarray)
    return outcome(trainer), both.predictions, one.predictions


def evaluation_before_the_training(side):
    trainer = side.trainer(compute_metrics=accuracy)
    before = without_times(trainer.evaluate())
    trainer.train()
    return before, outcome(trainer), without_times(trainer.evaluate())


def a_second_training(side):
    trainer = side.train()
    first = outcome(trainer)
    trainer.train()
    return first, outcome(trainer)


# Checkpoints


def resumes(side):
    found = []
    for name, make in (("plain", RegressionModel), ("pretrained", pretrained)):
        for accumulated in (1, 2):
            settings = dict(gradient_accumulation_steps=accumulated, save_strategy="steps", save_steps=5)
            settings |= dict(folder=f"{name}-{accumulated}", per_device_train_batch_size=4)
            whole = outcome(side.train(make(), **settings))
            for step in (5, 15, 20):
                again = outcome(side.train(make(), resume=step, **settings))
                assert_same(whole["weights"], again["weights"])
                found.append(again)
            found.append(whole)
    return found


def resumes_with_another_schedule(side):
    settings = dict(save_strategy="epoch", lr_scheduler_type="cosine")
    side.train(num_train_epochs=2, **settings)
    longer = side.train(num_train_epochs=4, resume=16, **settings)
    skipped = side.train(num_train_epochs=4, resume=16, ignore_data_skip=True, **settings)
    return outcome(longer), outcome(skipped)


def checkpoints_at_most(side):
    side.train(save_strategy="steps", save_steps=5, save_total_limit=2)
    kept = side.checkpoints()
    settings = dict(save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5, save_total_limit=1)
    side.train(folder="best", load_best_model_at_end=True, **settings)
    return kept, side.checkpoints("best")


def best_model_at_the_end(side):
    settings = dict(save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5)
    settings |= dict(load_best_model_at_end=True, compute_metrics=accuracy)
    by_loss = side.train(pretrained(a=1.5, b=2.5), folder="loss", learning_rate=0.4, **settings)
    by_metric = side.train(
        RegressionModel(1.5, 2.5),
        folder="metric",
        metric_for_best_model="accuracy",
        greater_is_better=True,
        **settings,
    )
    return outcome(by_loss), outcome(by_metric), without_times(by_metric.evaluate())


def early_stopping(side):
    settings = dict(save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True, num_train_epochs=12)
    patient = EarlyStoppingCallback(1, 0.0001)
    trainer = side.train(compute_metrics=accuracy, metric_for_best_model="accuracy", callbacks=[patient], **settings)
    assert trainer.state.global_step < 12 * 8
    return outcome(trainer)


def files(side):
    trainer = side.train(pretrained(a=0.5), save_strategy="epoch")
    trainer.save_model(str(side.folder / "saved"))
    names = sorted(path.name for path in (side.folder / "saved").iterdir())
    assert "model.safetensors" in names
    inside = {
        checkpoint: sorted(p.name for p in (side.folder / "run" / checkpoint).iterdir())
        for checkpoint in side.checkpoints()
    }
    return names, inside, (side.folder / "saved" / "model.safetensors").read_bytes()


def states(side):
    trainer = side.train(
        callbacks=[EarlyStoppingCallback(9)], eval_strategy="epoch", metric_for_best_model="eval_loss"
    )
    again = pickle.loads(pickle.dumps(trainer.state))
    assert again == trainer.state
    trainer.save_state()
    read = TrainerState.load_from_json(str(side.folder / "run" / "trainer_state.json"))
    return (
        without_times(read.log_history),
        read.global_step,
        read.epoch,
        [name for name in read.stateful_callbacks if name != "FreezeCallback"],
    )


# Callbacks


def events(side):
    diary = Diary()
    settings = dict(eval_strategy="steps", eval_steps=5, save_strategy="epoch", logging_strategy="epoch")
    trainer = side.train(callbacks=[diary], logging_first_step=True, **settings)
    trainer.predict(Regression(5))
    return diary.events, outcome(trainer)


def flags(side):
    trainings = [outcome(side.train(callbacks=[Flags(*stops)])) for stops in ((0, 0), (5, 0), (0, 11), (3, 17))]
    return trainings, side.checkpoints()


def search(side):
    if not is_optuna_available():
        pytest.skip("optuna is not installed")
    import optuna

    def space(trial):
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True),
            "num_train_epochs": trial.suggest_int("num_train_epochs", 2, 4),
        }

    trainer = side.trainer(
        model_init=lambda trial=None: RegressionModel(), eval_strategy="epoch", save_strategy="epoch", logging_steps=4
    )
    sampler = optuna.samplers.RandomSampler(seed=3)
    best = trainer.hyperparameter_search(direction="minimize", hp_space=space, n_trials=3, sampler=sampler)
    return best.run_id, best.objective, best.hyperparameters


SCENARIOS = (
    reproducible,
    schedules,
    optimizers_passed_in,
    optimizers_of_a_subclass,
    optimizers_by_name,
    accumulation,
    steps_at_most,
    clipping_and_decay,
    bfloat16,
    losses_that_are_nan,
    label_smoothing,
    labels_of_all_accumulated_batches,
    several_label_names,
    models,
    models_that_are_made_by_the_trainer,
    data_sets_with_more_columns,
    samplers,
    grouped_by_length,
    loader_processes,
    dynamic_shapes_of_an_evaluation,
    evaluations_and_predictions,
    evaluations_in_batches,
    ignored_keys,
    evaluation_before_the_training,
    a_second_training,
    resumes,
    resumes_with_another_schedule,
    checkpoints_at_most,
    best_model_at_the_end,
    early_stopping,
    files,
    states,
    events,
    flags,
    search,
)


def stream(side):
    return outcome(side.train(train_dataset=RegressionStream(), max_steps=20))


def dynamic_shapes(side):
    class InOrder(side.base):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    return outcome(side.train(base=InOrder, train_dataset=Sequences()))


#: What features cannot be made of is an error under settings of one's own: its words, and the step that it follows.
#: Several shapes are seen when a store is to be built, at the freeze; until then nothing is replayed.
REFUSED = {stream: ("iterable", 0), dynamic_shapes: ("collat|size|shape", 8)}


def cached(cache):
    return {
        "freeze_cache": FreezeCacheConfig(
            policy="manual", freeze_points="1:1", codec="fp32", cache=cache, blocks=list(BLOCKS)
        )
    }


@pytest.mark.parametrize("scenario", [*SCENARIOS, *REFUSED], ids=lambda scenario: scenario.__name__)
def test_switched_class_trains_as_trainer(scenario, tmp_path):
    expected = scenario(Side(Trainer, tmp_path / "trainer"))
    config = {"freeze_cache": FreezeCacheConfig(policy="none")}
    assert_same(expected, scenario(Side(FreezeCacheTrainer, tmp_path / "switched", config)))


@pytest.mark.parametrize("scenario", [*SCENARIOS, dynamic_shapes], ids=lambda scenario: scenario.__name__)
def test_defaults_train_as_freezing_alone(scenario, tmp_path):
    """What the defaults freeze of a model that nobody declared, they train as without a cache."""
    never = {"freeze_cache": FreezeCacheConfig(cache="never")}
    expected = scenario(Side(FreezeCacheTrainer, tmp_path / "never", never))
    assert_same(expected, scenario(Side(FreezeCacheTrainer, tmp_path / "defaults")))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_cached_training_is_the_frozen_one(scenario, tmp_path):
    expected = scenario(Side(FreezeCacheTrainer, tmp_path / "never", cached("never")))
    side = Side(FreezeCacheTrainer, tmp_path / "always", cached("always"))
    assert_same(expected, scenario(side))
    for trainer in side.made:
        modes = {phase.mode for phase in trainer.freeze_cache_report().phases} if trainer.state.epoch else set()
        assert "replay" in modes or (trainer.state.epoch or 0) <= 1, f"{trainer.args.output_dir} replays nothing"


@pytest.mark.parametrize("scenario", REFUSED, ids=lambda scenario: scenario.__name__)
def test_what_cannot_be_cached_is_refused_before_anything_is_replayed(scenario, tmp_path):
    side = Side(FreezeCacheTrainer, tmp_path, cached("always"))
    words, step = REFUSED[scenario]
    with pytest.raises(ValueError, match=words):
        scenario(side)
    assert side.made[-1].state.global_step == step
