"""Regressions of one number: data, models with the parameters a and b, and one training under two trainers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments

BLOCKS = ("scale", "shift")
#: Names of log entries that differ from run to run.
_TIMES = ("runtime", "per_second", "preparation_time")


class Regression(torch.utils.data.Dataset):
    """`y = 2 x + 3` and noise; `labels` under one or several names."""

    def __init__(self, rows: int = 64, seed: int = 42, label_names: tuple[str, ...] = ("labels",)):
        generator = np.random.RandomState(seed)
        self.x = generator.normal(size=(rows,)).astype(np.float32)
        noise = generator.normal(scale=0.1, size=(len(label_names), rows))
        self.y = {
            name: (2.0 * self.x + 3.0 + row).astype(np.float32) for name, row in zip(label_names, noise, strict=True)
        }

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_x": self.x[row], **{name: values[row] for name, values in self.y.items()}}


class RegressionStream(torch.utils.data.IterableDataset):
    """The same, without a length."""

    def __init__(self, rows: int = 64):
        self.rows = Regression(rows)

    def __iter__(self):
        return (self.rows[row] for row in range(len(self.rows)))


class Sequences(torch.utils.data.Dataset):
    """Rows of several numbers: of one length in a batch of eight, of another one in the next."""

    def __init__(self, rows: int = 64, batch: int = 8):
        generator = np.random.RandomState(7)
        lengths = np.repeat(generator.randint(1, 20, rows // batch), batch)
        self.x = [generator.normal(size=(length,)).astype(np.float32) for length in lengths]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_x": self.x[row], "labels": 2.0 * self.x[row] + 3.0}


class Scale(nn.Module):
    def __init__(self, a: float):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(float(a)))

    def forward(self, x):
        return x.unsqueeze(-1) * self.a


class Shift(nn.Module):
    def __init__(self, b: float):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(float(b)))

    def forward(self, x):
        return x + self.b


class RegressionModel(nn.Module):
    """Answers with a tuple; `double` repeats the prediction."""

    main_input_name = "input_x"

    def __init__(self, a: float = 0.0, b: float = 0.0, double: bool = False):
        super().__init__()
        self.scale, self.shift, self.double, self.config = Scale(a), Shift(b), double, None

    def predict(self, input_x):
        return self.shift(self.scale(input_x)).squeeze(-1)

    def forward(self, input_x, labels=None, **kwargs):
        y = self.predict(input_x)
        answers = (y, y) if self.double else (y,)
        return answers if labels is None else (nn.functional.mse_loss(y, labels), *answers)


class DictModel(RegressionModel):
    """Answers with a dict."""

    def forward(self, input_x, labels=None, **kwargs):
        y = self.predict(input_x)
        answers = {"output": y, "output_2": y} if self.double else {"output": y}
        return answers if labels is None else {"loss": nn.functional.mse_loss(y, labels), **answers}


class TwoLabels(RegressionModel):
    def forward(self, input_x, labels_1=None, labels_2=None, **kwargs):
        y = self.predict(input_x)
        if labels_1 is None:
            return (y,)
        return nn.functional.mse_loss(y, labels_1) + nn.functional.mse_loss(y, labels_2), y


class CountingModel(RegressionModel):
    """Takes part in the division by the labels of all accumulated batches."""

    accepts_loss_kwargs = True

    def forward(self, input_x, labels=None, num_items_in_batch=None, **kwargs):
        y = self.predict(input_x)
        if labels is None:
            return (y,)
        total = ((y - labels) ** 2).sum()
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch), y


class Classifier(RegressionModel):
    """Two classes: above and below the line."""

    def forward(self, input_x, labels=None, **kwargs):
        y = self.predict(input_x)
        logits = torch.stack([-y, y], -1)
        return (
            {"logits": logits}
            if labels is None
            else {
                "loss": nn.functional.cross_entropy(logits, labels),
                "logits": logits,
            }
        )


class RegressionConfig(PretrainedConfig):
    model_type = "regression_of_a_number"

    def __init__(self, a: float = 0.0, b: float = 0.0, double: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b, self.double, self.hidden_size = a, b, double, 1


class PretrainedRegression(PreTrainedModel):
    """With a configuration, saved as safetensors."""

    config_class, base_model_prefix, main_input_name = RegressionConfig, "regression", "input_x"

    def __init__(self, config: RegressionConfig):
        super().__init__(config)
        self.scale, self.shift = Scale(config.a), Shift(config.b)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_x, labels=None, **kwargs):
        y = self.shift(self.scale(input_x)).squeeze(-1)
        answers = (y, y) if self.config.double else (y,)
        return answers if labels is None else (nn.functional.mse_loss(y, labels), *answers)


def pretrained(**settings) -> PretrainedRegression:
    return PretrainedRegression(RegressionConfig(**settings))


def accuracy(prediction):
    values = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(np.mean(np.abs(np.asarray(values) - np.asarray(prediction.label_ids)) <= 0.25))}


def own_optimizers(model, steps=24):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / steps))


class Diary(TrainerCallback):
    """Writes down every event."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            events = super().__getattribute__("events")

            def note(args, state, control, **kwargs):
                events.append((name, state.global_step, state.epoch, sorted(kwargs)))

            return note
        return super().__getattribute__(name)


class Flags(TrainerCallback):
    """Sets the flags that a loop obeys."""

    def __init__(self, stop_epoch, stop):
        self.stop_epoch, self.stop = stop_epoch, stop

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = state.global_step % 2 == 0
        control.should_evaluate = state.global_step % 3 == 0
        control.should_save = state.global_step == 4
        control.should_epoch_stop = state.global_step == self.stop_epoch
        control.should_training_stop = state.global_step == self.stop
        return control


@dataclass
class Side:
    """One of two trainers that must do the same.

    Args:
        base: the class.
        folder: for everything that it writes.
        settings: what only it gets.
        made: the trainers, in the order in which they were made.
    """

    base: type
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    made: list[Any] = field(default_factory=list)

    def trainer(self, model: Any = None, base: type | None = None, folder: str = "run", **settings) -> Any:
        """A trainer; settings named as `Trainer`'s go there, the others to the arguments."""
        names = (
            "model_init callbacks data_collator compute_metrics optimizers optimizer_cls_and_kwargs "
            "preprocess_logits_for_metrics compute_loss_func train_dataset eval_dataset"
        ).split()
        own = {name: settings.pop(name) for name in names if name in settings}
        own = {"train_dataset": Regression(), "eval_dataset": Regression(32, seed=5), **own}
        if "model_init" not in own:
            own["model"] = RegressionModel() if model is None else model
        defaults = dict(
            learning_rate=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        args = TrainingArguments(output_dir=str(self.folder / folder), **{**defaults, **settings})
        self.made.append((self.base if base is None else base)(args=args, **own, **self.settings))
        return self.made[-1]

    def train(self, *args, resume=None, **settings) -> Any:
        trainer = self.trainer(*args, **settings)
        trainer.train(resume_from_checkpoint=resume and str(trainer.args.output_dir) + f"/checkpoint-{resume}")
        return trainer

    def checkpoints(self, folder: str = "run") -> list[str]:
        return sorted(path.name for path in (self.folder / folder).glob("checkpoint-*"))


def outcome(trainer: Any) -> dict[str, Any]:
    """What a training leaves: log, weights, gradients' norms (in the log), state."""
    state = trainer.state
    return {
        "log": without_times(state.log_history),
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "steps": (state.global_step, state.max_steps, state.epoch, state.num_train_epochs),
        "best": (state.best_metric, state.best_global_step),
    }


def without_times(entries: Any) -> Any:
    """Log entries or metrics without what differs from run to run, and without the floating-point operations."""
    if isinstance(entries, list):
        return [without_times(entry) for entry in entries]
    return {name: value for name, value in entries.items() if not name.endswith(_TIMES) and name != "total_flos"}


def assert_same(one: Any, other: Any, where: str = "result") -> None:
    """Equal bit for bit: numbers, arrays, tensors, and containers of them."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, err_msg=where)
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for name in one:
            assert_same(one[name], other[name], f"{where}[{name!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for place, (value, against) in enumerate(zip(one, other, strict=True)):
            assert_same(value, against, f"{where}[{place}]")
    else:
        assert one == other or (one != one and other != other), where
