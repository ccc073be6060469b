"""What `Trainer` pushes to the Hub: the model or its head, with a card of what was measured; never a feature store."""

from __future__ import annotations

import inspect
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers import PretrainedConfig
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..hub.card import CardFacts, Shown, render_card
from ..hub.errors import HeadError
from ..hub.left_out import stores_left_out
from ..hub.pushing import Push, push_folder
from ..hub.rebuild import base_of
from ..hub.saving import save_head
from ..model.checkpoint import is_adapter
from .hooks import TrainerHooks

logger = logging.get_logger(__name__)

#: Folder of the head in a training's output folder; `Trainer` uploads nothing that begins with `_`.
HEAD_FOLDER = "_head"
#: Where `Trainer` writes its arguments.
_ARGUMENTS_FILE = "training_args.bin"
#: Kinds of files that `datasets` was made of, which are no data sets on the Hub.
_FILES = {None, "csv", "json", "pandas", "parquet", "text", "generator", "imagefolder", "audiofolder", "arrow"}


class HubHooks(TrainerHooks):
    """Pushes to the Hub, and model cards."""

    def push_to_hub(self, *args, **kwargs):
        if not self._freeze_config.push_head_only:
            with self._left_out():
                return super().push_to_hub(*args, **kwargs)
        given = _arguments(super().push_to_hub, args, kwargs)
        card = {**given.pop("kwargs", {})}
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        folder = self._save_head_to_push(_facts(card))
        push = Push(
            self._head_repo,
            given.get("private") if given.get("private") is not None else self.args.hub_private_repo,
            given["token"] if given["token"] is not None else self.args.hub_token,
            given["commit_message"],
            revision=given["revision"] or self.args.hub_revision,
        )
        return push_folder(folder, push) if given["blocking"] else HfApi().run_as_future(push_folder, folder, push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._freeze_config.push_head_only:
            with self._left_out():
                super()._push_from_checkpoint(checkpoint_folder)
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return
        if self._session is None or not self._session.chain.cut:
            logger.info("Nothing is frozen yet, so no head is pushed with this checkpoint.")
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        try:
            folder = self._save_head_to_push(CardFacts())
        except HeadError as error:  # the training is worth more than this push; the last one fails with it
            logger.warning(f"No head is pushed with this checkpoint: {error}")
            return
        message = f"Training in progress, step {self.state.global_step}"
        push = Push(
            self._head_repo, self.args.hub_private_repo, self.args.hub_token, message, revision=self.args.hub_revision
        )
        job: Future = HfApi().run_as_future(push_folder, folder, push)
        job.add_done_callback(_tell_failure)
        self.push_in_progress = PushInProgress([job])  # type: ignore[assignment, arg-type]  # of lists, as `Trainer` does

    def _left_out(self) -> AbstractContextManager:
        """Inside, `Trainer` uploads neither feature stores nor the token, which it writes with its arguments."""
        names = [] if self.args.hub_token is None else [_ARGUMENTS_FILE]
        if names:
            logger.warning_once(f"{_ARGUMENTS_FILE} is not pushed: it contains hub_token.")
        return stores_left_out(self._feature_cache_dir, names)

    @property
    def _head_repo(self) -> str:
        assert self.args.output_dir is not None  # `TrainingArguments` puts a name in place of None
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _save_head_to_push(self, facts: CardFacts) -> Path:
        assert self.args.output_dir is not None
        facts = replace(facts, repo_id=self._head_repo)
        return save_head(self, Path(self.args.output_dir) / HEAD_FOLDER, token=self.args.hub_token, card=facts)

    def _check_hub_strategy(self) -> None:
        """Checks that what is pushed is either heads or checkpoints.

        Raises:
            ValueError: if it is both.
        """
        strategy = HubStrategy(self.args.hub_strategy)
        pushes_checkpoints = strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        if self._freeze_config.push_head_only and self.args.push_to_hub and pushes_checkpoints:
            raise ValueError(
                f"push_head_only pushes heads, hub_strategy='{strategy.value}' whole checkpoints: set "
                "hub_strategy='every_save' or 'end', or push_head_only=False."
            )

    def create_model_card(self, *args, **kwargs) -> None:
        if not self._is_active or is_adapter(self.accelerator.unwrap_model(self.model)):
            super().create_model_card(*args, **kwargs)
            return
        if not self.is_world_process_zero():
            return
        assert self.args.output_dir is not None
        path = Path(self.args.output_dir) / "README.md"
        facts = _facts(_arguments(super().create_model_card, args, kwargs))
        earlier = ModelCard.load(path).data.tags or [] if path.exists() else []
        tags = dict.fromkeys([*facts.tags, "generated_from_trainer", *earlier])
        named = facts.dataset_tags or self._dataset_tags()
        name = facts.model_name or Path(self.args.output_dir).name
        facts = replace(facts, model_name=name, repo_id=self.hub_model_id, tags=list(tags), dataset_tags=named)
        base = base_of(self._own_model)
        base = None if base is None or Path(base).is_dir() else base
        is_own = not isinstance(getattr(self._own_model, "config", None), PretrainedConfig)
        shown = Shown(type(self._own_model).__name__, base, is_loadable=not is_own)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render_card(shown, self, facts), encoding="utf-8")

    def _dataset_tags(self) -> list[str]:
        """As `Trainer` finds them: the data set on the Hub from which rows come."""
        dataset = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        name = getattr(dataset, "builder_name", None)
        return [] if name in _FILES or not isinstance(name, str) else [name]


def _arguments(method: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _facts(given: dict[str, Any]) -> CardFacts:
    """Arguments of `create_model_card` as facts of a card."""
    return CardFacts(
        model_name=given.get("model_name"),
        dataset=", ".join(_listed(given.get("dataset"))) or None,
        dataset_tags=_listed(given.get("dataset_tags")),
        license=given.get("license"),
        language=given.get("language"),
        tasks=_listed(given.get("tasks")),
        tags=_listed(given.get("tags")),
        finetuned_from=given.get("finetuned_from"),
    )


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _tell_failure(job: Future) -> None:
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.warning(f"The push of a head in the course of the training has failed, the training goes on: {error}")
