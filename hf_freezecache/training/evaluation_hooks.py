"""How `Trainer` evaluates while a training freezes and caches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import speed_metrics

from ..distributed import count_operations
from ..model.stand_ins import FrozenOutputError, StandIn
from ..model.structure import find_tensors
from ..rng import RngState, preserve_rng
from .epoch_source import EpochSource, FromImages, FromStore
from .evaluation import EvaluationCache, EvaluationPass, cached_names
from .hooks import TrainerHooks
from .session import FreezeSession


class EvaluationHooks(TrainerHooks):
    """Books evaluations, and runs those of a training from stores where `cache_eval` asks for it."""

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        evaluation = self._evaluation
        if evaluation is None:
            return super().evaluate(*args, **kwargs)
        with evaluation.evaluation() as passes:
            metrics = super().evaluate(*args, **kwargs)
            for first in list(passes) if evaluation.is_last() else ():
                # Callbacks may have evaluated other sets inside under the same names: they change nothing here.
                own = {name for name, value in first.metrics.items() if metrics.get(name) == value}
                with preserve_rng():
                    on_images = self._repeat_last(evaluation, first)
                metrics.update({name: value for name, value in on_images.items() if name in own})
        return metrics

    def _repeat_last(self, evaluation: EvaluationCache, first: EvaluationPass) -> dict[str, float]:
        """Repeats the last evaluation from the other source and logs it; the store's metrics are named `_cached`.

        Callbacks that count evaluations are not told.

        Returns:
            The metrics of the pass on samples, under the names that they have in `first`.
        """
        source = evaluation.second_source(first)
        if source is None:
            return {}
        prefix = f"{first.prefix}_cached" if isinstance(source, FromStore) else first.prefix
        second = self._evaluate_from(source, first, prefix)
        if first.from_store:
            from_store = cached_names(first.metrics, first.prefix)
            self.log(dict(from_store))
            on_images = second
        else:
            from_store, on_images = second, first.metrics
        evaluation.compare(on_images, from_store, first.prefix)
        return {name: value for name, value in on_images.items() if name in first.metrics}

    def _evaluate_from(self, source: EpochSource, first: EvaluationPass, prefix: str) -> dict[str, float]:
        """Runs an evaluation again from a source, and logs it as `Trainer.evaluate` does."""
        start = time.time()
        output = self._run_evaluation(source, first.loader, metric_key_prefix=prefix, **first.settings)
        steps = math.ceil(output.num_samples / (self.args.eval_batch_size * self.args.world_size))
        output.metrics.update(speed_metrics(prefix, start, num_samples=output.num_samples, num_steps=steps))
        self.log(output.metrics)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_evaluate(self.args, self.state, self.control)  # closes its bar
        return output.metrics

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        loader = super().get_eval_dataloader(*args, **kwargs)
        if self._session is not None and self._evaluation is not None:
            self._evaluation.prepare(loader)
            # A checkpoint may be written before the next step.
            self.current_flos += self._session.meter.take_build_flops()  # type: ignore[assignment]  # a float later
        return loader

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs,
    ):
        settings = {
            "description": description,
            "prediction_loss_only": prediction_loss_only,
            "ignore_keys": ignore_keys,
            **kwargs,
        }
        if self._session is None:
            return super().evaluation_loop(dataloader, metric_key_prefix=metric_key_prefix, **settings)
        source = (
            FromImages(self._session.chain.cut) if self._evaluation is None else self._evaluation.source_of(dataloader)
        )
        before = RngState()
        try:
            output = self._run_evaluation(source, dataloader, metric_key_prefix=metric_key_prefix, **settings)
        except FrozenOutputError as error:
            if self._evaluation is None or not isinstance(source, FromStore):
                raise
            source = self._evaluation.decline(dataloader, error)
            before.restore()  # an iteration over a loader draws
            output = self._run_evaluation(source, dataloader, metric_key_prefix=metric_key_prefix, **settings)
        if self._evaluation is not None:
            self._evaluation.record(EvaluationPass(dataloader, metric_key_prefix, settings, source, output.metrics))
        return output

    def _run_evaluation(self, source: EpochSource, dataloader: DataLoader, *args, **kwargs):
        if self._session is None:
            raise RuntimeError("an evaluation has a source only while a training runs.")
        with _booked(self._session, dataloader, source) as book_samples:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
            book_samples(output.num_samples or 0)
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        evaluation, step = self._evaluation, super().prediction_step
        if self._session is None:
            return step(model, inputs, *args, **kwargs)
        self._session.meter.see(inputs)
        if evaluation is None:
            return step(model, inputs, *args, **kwargs)
        force_eager = self._session.force_eager

        def run():
            with evaluation.prediction_step(inputs, force_eager=force_eager) as step_inputs:
                answer = step(model, step_inputs, *args, **kwargs)
            for tensor in find_tensors(answer).values():
                if isinstance(tensor, StandIn):
                    tensor.item()  # raises, and tells what is missing
            return answer

        def run_in_step():
            try:
                return run()
            except FrozenOutputError:
                if evaluation.group.size > 1 and count_operations() == self._operations_before_loss:
                    # Others may have come to where the loss communicates, and wait: this process comes there, too.
                    with preserve_rng(), self._counting_alone():
                        step(model, evaluation.images_of(inputs), *args, **kwargs)
                raise

        # What fails on features fails on all processes: they begin again together, on samples.
        return evaluation.group.on_all(run_in_step) if evaluation.is_replaying else run()

    @contextmanager
    def _counting_alone(self) -> Iterator[None]:
        """Inside, `Trainer` does not ask other processes for their number of tokens, as it has done that already."""
        before, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = before

    def _why_on_images(self) -> str | None:
        """Why evaluations cannot be from a store; None if they can."""
        if "inputs" in self.args.include_for_metrics:
            return "include_for_metrics asks for the inputs"
        if getattr(self.args, "predict_with_generate", False):
            return "predict_with_generate"
        overriding = self._overriding("prediction_step")
        return None if overriding is None else f"`{overriding.__name__}.prediction_step` is overridden"


@contextmanager
def _booked(session: FreezeSession, loader: DataLoader, source: EpochSource) -> Iterator[Callable[[int], None]]:
    """Books one evaluation; yields a function that takes its number of samples.

    Args:
        session: the training.
        loader: of the evaluation.
        source: where its batches come from.
    """
    if not isinstance(source, FromStore):
        session.offloading.bring_back()
    with session.ledger.phase(session.chain.cut, "eval") as phase:
        counts: list[int] = []
        session.meter.mean_seen()  # of one that has failed
        with nullcontext() if session.evaluation is None else session.evaluation.replaying(loader, source):
            yield counts.append
        phase.epochs += 1
        flops = session.meter.per_sample("eval_replay" if isinstance(source, FromStore) else "eval")
        phase.flops += flops * session.meter.mean_seen() * sum(counts) / session.group.size
