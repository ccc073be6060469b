"""Whether and how a frozen prefix's features get into a store: reuse, decide, build, say so."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from .cache.fingerprint import fingerprint_inputs
from .cache.materialize import BuildFailed, BuildPlan, estimate_bytes, materialize, open_matching
from .cache.rows import RowSource
from .cache.store import FORMAT_VERSION, FeatureStore
from .chain import BlockChain
from .config import FreezeCacheConfig
from .distributed import Group

logger = logging.get_logger(__name__)

#: The part of the free disk that a store may take under `cache="auto"`: checkpoints need room too.
_DISK_SHARE = 0.9


class FeatureCaching:
    """Gets the store for a cut.

    Args:
        model: the model itself, not wrapped.
        chain: its blocks.
        source: the train samples as model inputs.
        config: the user's settings.
        explicit: whether the user gave them; the defaults never cost a training.
        cache_dir: where stores lie.
        group: the processes.
        model_inputs: of a collated batch, what the model takes, on its device.
        precision: mixed precision of the training.
        disable_tqdm: no progress bars.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        chain: BlockChain,
        source: RowSource,
        config: FreezeCacheConfig,
        explicit: bool,
        cache_dir: Path,
        group: Group,
        model_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        precision: str,
        disable_tqdm: bool,
    ):
        self.model, self.chain, self.source, self.config, self.explicit = model, chain, source, config, explicit
        self.cache_dir, self.group, self.model_inputs = cache_dir, group, model_inputs
        self.precision, self.disable_tqdm = precision, disable_tqdm
        self._warned_random = False

    def obtain(self, cut: int, whole_epoch: bool) -> tuple[FeatureStore | None, bool]:
        """Opens the matching store or builds it, if that is wanted and possible.

        Args:
            cut: frozen blocks.
            whole_epoch: whether at least one whole epoch remains.

        Returns:
            The store, None if training goes on from images; and whether it was built now.

        Raises:
            ValueError: under explicit settings, if the features cannot be kept (not finite, of several sizes).
        """
        survivable = (BuildFailed,) if self.explicit else (BuildFailed, ValueError, RuntimeError)
        try:
            plan = self._plan(cut)
            self._warn_if_random()
            store = open_matching(plan, self.group)
            if store is not None:
                self._say(f"Reusing the feature store {store.path} ({megabytes(store.bytes)}).", logging.INFO)
                return store, False
            refusal = self._refusal(plan, whole_epoch)
            if refusal is not None:
                self._say(f"No feature store for cut {cut}, training goes on frozen, from images: {refusal}.")
                return None, False
            store = materialize(plan, self.group)
        except survivable as error:
            self._say(f"The feature store could not be built, training goes on frozen, from images: {error}")
            return None, False
        self._say(
            f"Built the feature store {store.path} ({megabytes(store.bytes)}, {self.config.codec}, {len(store)} "
            f"samples): {cut} of {len(self.chain)} blocks are not run any more in training."
        )
        return store, True

    def _plan(self, cut: int) -> BuildPlan:
        def prove():
            probe = self.model_inputs(self.source.probe())
            # Traced again: mixed precision set up since the training began may change the type of the features.
            self.chain.trace(probe)
            self.chain.prove(probe, cut)

        def made_from():
            return fingerprint_inputs(
                source=self.source,
                model=self.model,
                tensors={**self.chain.prefix_parameters(cut), **self.chain.prefix_buffers(cut)},
                cut=cut,
                blocks=self.chain.names[:cut],
                codec=self.config.codec,
                precision=self.precision,
                format_version=FORMAT_VERSION,
            )

        self.group.locally(prove)
        return BuildPlan(
            chain=self.chain,
            cut=cut,
            source=self.source,
            codec=self.config.codec,
            layout=self.chain.layout(cut),
            made_from=self.group.on_main(made_from),
            directory=self.cache_dir,
            model_inputs=self.model_inputs,
            disable_tqdm=self.disable_tqdm,
        )

    def _refusal(self, plan: BuildPlan, whole_epoch: bool) -> str | None:
        """Why `cache="auto"` does not build; None if it does."""
        if self.config.cache == "always":
            return None
        if not whole_epoch:
            return "less than one epoch remains"

        def compare() -> str | None:
            needed = estimate_bytes(plan)
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.cache_dir).free
            if needed <= _DISK_SHARE * free:
                return None
            return f"it needs {megabytes(needed)} and {self.cache_dir} has {megabytes(free)} free"

        return self.group.on_main(compare)

    def _warn_if_random(self) -> None:
        if self.group.rank == 0 and not self._warned_random:
            changes = hasattr(self.source.dataset, "set_epoch")
            if changes or self.source.is_random():
                self._warned_random = True
                what = "changes with the epoch" if changes else "is random (transform or collator)"
                self._say(
                    f"The train data set {what}: what is drawn when the feature store is built is repeated in every "
                    "replay epoch (views=0); augmentation ends at the freeze point."
                )

    def _say(self, message: str, level: int = logging.WARNING) -> None:
        """Logs on the main process. What writes to the disk or ends caching is said at the default log level."""
        if self.group.rank == 0:
            logger.log(level, message)


def megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
