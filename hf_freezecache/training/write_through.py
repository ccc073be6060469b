"""Stores that cost no pass of their own: the first epochs after a freeze run live, and what they compute is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.utils import logging

from ..build.feature_sources import ViewRun
from ..build.materialize import GeometryMisfit
from ..build.partial import PartialStore
from ..cache.rows import split_batch
from ..cache.store import FeatureStore
from ..model.chain import BlockChain
from ..model.layout import FeatureLayout
from ..replay.collator import DrawnViews
from ..replay.dataset import SourceSwitch, WriteRound
from .store_keeper import WRITTEN, StoreKeeper

logger = logging.get_logger(__name__)

_MISFIT, _FAILURE = "misfit", "failure"


class WriteThrough:
    """Where the store of a cut comes from, under `materialize="write_through"` from the training itself.

    With V augmented views, V + 1 epochs after the freeze run live through the frozen prefix. In each of them every
    sample is drawn as another of its views (the base view is one), as the store would draw it; its features train the
    suffix as they are and go to the store as codes. Then the store is finished, and replay begins. What no epoch has
    drawn (a sampler leaves samples out, a killed run has lost them) is computed then.

    Nothing of this may cost the training: what fails while it is kept is said once, at the next epoch's beginning, on
    all processes together. If a view's geometry does not fit the store is built upfront then; else training goes on
    live.

    Args:
        caching: plans and builds.
        chain: the model.
        switch: says what samples are drawn for.
        model_inputs: of a collated batch, what the model takes for its prefix, on its device.
    """

    def __init__(
        self,
        caching: StoreKeeper,
        chain: BlockChain,
        switch: SourceSwitch,
        model_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ):
        self.caching, self.chain, self.switch, self.model_inputs = caching, chain, switch, model_inputs
        self.group = caching.group
        # A complete store is drawn for, and not written, where a training is resumed from before it was finished.
        self._kept: PartialStore | FeatureStore | None = None
        self._cut = self._start = self._gave_up = self._done = -1
        self._restored_cut: int | None = None
        self._fingerprint: str | None = None
        # Kind, reason, and the epoch at whose end it counts.
        self._problem: tuple[str, str, int] | None = None

    @property
    def running(self) -> bool:
        """Whether the running epoch's features are kept."""
        return self._cut >= 0

    @property
    def bytes(self) -> int:
        """Bytes that are reserved for what is kept."""
        return self._kept.bytes if isinstance(self._kept, PartialStore) else 0

    @property
    def layout(self) -> FeatureLayout:
        """Of the features that the running epoch trains on."""
        return self.chain.layout(self._cut)

    def obtain(self, cut: int, epochs_left: float) -> tuple[FeatureStore | None, bool]:
        """The store to replay from in the epoch that begins; see `StoreKeeper.obtain`.

        Returns:
            The store, None if the epoch runs live (`running` says whether its features are kept); and whether it was
            finished or built now.
        """
        if self.caching.config.materialize != "write_through" or self._gave_up == cut:
            return self.caching.obtain(cut, epochs_left)
        if self.running and self._cut != cut:
            self.caching.say(
                f"The feature store of cut {self._cut} was not finished before the next freeze: it is given up.",
                logging.INFO,
            )
            self._remove()
        if self._done == cut:
            return self._again(cut, epochs_left)
        if not self.running:
            return self._begin(cut, epochs_left)
        return self._go_on(epochs_left)

    def features(self, drawn: DrawnViews, batch: Mapping[str, Any]) -> torch.Tensor:
        """Runs the prefix on a live batch and keeps the features.

        Args:
            drawn: which views the samples were drawn as.
            batch: the model inputs.

        Returns:
            `(B, *layout.shape)`, the features themselves, not what the codec makes of them.
        """
        features = self.chain.prefix(self.model_inputs(batch), self._cut)
        if self._problem is None and isinstance(self._kept, PartialStore):
            try:
                split = split_batch(batch, self.chain.main_input)
                ran = ViewRun(split.columns, split.constants, features, drawn.geometry, drawn.refused)
                self._kept.write(drawn.numbers.tolist(), drawn.views.cpu().numpy(), ran)
            except GeometryMisfit as misfit:
                self._problem = (_MISFIT, str(misfit), self.switch.epoch)
            except Exception as error:  # the step itself does not need it; said when the next epoch begins
                self._problem = (_FAILURE, str(error), self.switch.epoch)
        return features

    def close(self) -> None:
        """Lets go of the files; what was kept stays for a resumed training."""
        if isinstance(self._kept, PartialStore):
            self._kept.close()

    def state(self) -> dict[str, Any]:
        """JSON values to continue from."""
        return {
            "cut": self._cut,
            "start": self._start,
            "gave_up": self._gave_up,
            "done": self._done,
            "fingerprint": self._fingerprint,
            "problem": self._problem,
        }

    def load(self, cut: int, state: Mapping[str, Any]) -> None:
        """Continues from `state()` and the cut of the checkpoint."""
        self._restored_cut = cut
        self._cut, self._start = state["cut"], state["start"]
        self._gave_up, self._done = state["gave_up"], state["done"]
        self._fingerprint = state["fingerprint"]
        self._problem = None if state["problem"] is None else tuple(state["problem"])

    def _begin(self, cut: int, epochs_left: float) -> tuple[FeatureStore | None, bool]:
        kept, built = self.caching.begin_writing(cut, epochs_left)
        if kept is None:
            return None, False
        if isinstance(kept, FeatureStore) and not self._wrote_it_before(kept, cut, epochs_left):
            self._done = cut
            return kept, built
        self._cut, self._start = cut, self.switch.epoch
        self._draw_for(kept)
        return None, False

    def _wrote_it_before(self, store: FeatureStore, cut: int, epochs_left: float) -> bool:
        """Whether this training, resumed from before the freeze, has made the store by epochs that it now repeats."""
        written = WRITTEN in store.manifest.made_from
        resumed = self._restored_cut is not None and self._restored_cut < cut
        return written and resumed and epochs_left >= store.manifest.views + 2

    def _again(self, cut: int, epochs_left: float) -> tuple[FeatureStore | None, bool]:
        """The store that a resumed training replayed from already; made anew where it is gone."""
        kept, built = self.caching.begin_writing(cut, epochs_left, decided=True)
        if not isinstance(kept, PartialStore):
            return kept, built
        self._kept, self._cut = kept, cut
        return self._finish(epochs_left)

    def _go_on(self, epochs_left: float) -> tuple[FeatureStore | None, bool]:
        problems = [problem for problem in self.group.gather(self._problem) if problem is not None]
        # A training resumed in the middle of the epoch goes on to its end, as the uninterrupted one did.
        problems = [(kind, reason) for kind, reason, epoch in problems if epoch < self.switch.epoch]
        if problems:
            return self._give_up(*max(problems), epochs_left)  # a misfit first: a build may still do
        if self._kept is None:
            kept, _ = self.caching.begin_writing(self._cut, epochs_left, decided=True, upfront=False)
            if kept is None:
                self._remove()
                return None, False
            self._kept = kept
        if self.switch.epoch - self._start <= self._kept.views.spec.count:
            self._draw_for(self._kept)
            return None, False
        return self._finish(epochs_left)

    def _draw_for(self, kept: PartialStore | FeatureStore) -> None:
        spec, layout = kept.views.spec, kept.codec.layout
        geometry = None if spec.whole else (spec.geometry, layout.grid)
        self._kept = kept
        self._fingerprint = kept.spec.path.name if isinstance(kept, PartialStore) else kept.path.name
        self.switch.write(WriteRound(self.switch.epoch - self._start, spec.count, geometry))

    def _finish(self, epochs_left: float) -> tuple[FeatureStore | None, bool]:
        if isinstance(self._kept, FeatureStore):
            store, self._kept, self._cut, self._done = self._kept, None, -1, self._cut
            return store, False
        try:
            store = self._kept.finish()
        except GeometryMisfit as misfit:
            return self._give_up(_MISFIT, str(misfit), epochs_left)
        except Exception as error:  # the same on all processes
            return self._give_up(_FAILURE, str(error), epochs_left)
        self.caching.written(self._kept, store)
        self._kept, self._cut, self._done = None, -1, self._cut
        return store, True

    def _give_up(self, kind: str, reason: str, epochs_left: float) -> tuple[FeatureStore | None, bool]:
        cut = self._cut
        self._remove()
        if kind == _MISFIT:
            self._gave_up = cut
            self.caching.say(f"The feature store is built upfront, not written by training epochs, because {reason}.")
            return self.caching.obtain(cut, epochs_left)
        self.caching.say(f"The feature store could not be written, training goes on frozen, from images: {reason}")
        return None, False

    def _remove(self) -> None:
        if isinstance(self._kept, PartialStore):
            self._kept.remove()
            self.caching.forget(self._kept.path)
        elif self._kept is None and self._fingerprint is not None:
            left = self.caching.cache_dir / f"{self._fingerprint}.partial"  # resumed, and not opened again
            self.caching.forget(left)
            if self.group.rank == 0:
                shutil.rmtree(left, ignore_errors=True)
        self._kept, self._cut, self._problem, self._fingerprint = None, -1, None, None
