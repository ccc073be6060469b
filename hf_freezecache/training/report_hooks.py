"""What a training leaves for people: its record, pictures and a page at the end, numbers in the logs on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..cache.store import FeatureStore
from ..distributed import Announcer, hearing
from ..hub.card import describe_hardware, library_versions
from ..reporting.charts import draw_run, make_figure
from ..reporting.page import make_page
from ..reporting.run_record import RunRecord
from .hooks import TrainerHooks
from .journal import Journal
from .session import FreezeSession

logger = logging.get_logger(__name__)

#: Files beside the record.
PICTURE, PAGE = "freeze_cache_report.png", "freeze_cache_report.html"


class ReportHooks(TrainerHooks):
    """Keeps a journal of each training and writes its record, as `FreezeCacheConfig.report` says."""

    # Of the running or last training.
    _journal: Journal

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        """Inside, a training; its record is written where it does not break off.

        Raises:
            ImportError: before it begins, if the pictures that are asked for cannot be drawn.
        """
        self._journal, kind = Journal(), self._freeze_config.report
        if kind == "html":
            make_figure(1, 1)
        with hearing(self._journal.note):
            yield
        if self._session is not None and kind != "none" and self.is_world_process_zero():
            self._write_report(self._session)

    def _begin_record(self, session: FreezeSession) -> None:
        """Puts the journal in a session's hands, before it does anything."""
        session.journal = self._journal

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._session is not None and self._freeze_config.report != "none":
            logs = {**logs, **self._session.numbers()}
        super().log(logs, *args, **kwargs)

    def _write_report(self, session: FreezeSession) -> None:
        announcer, folder = Announcer(session.group, logger), Path(str(self.args.output_dir))
        announcer.warning(f"What the training has cost:\n{session.report()}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            record = self._make_record(session)
            record.write(folder)
            if self._freeze_config.report == "html":
                draw_run(record, folder / PICTURE)
                (folder / PAGE).write_text(make_page(record), encoding="utf-8", errors="replace")
        except Exception as error:  # whatever a picture raises: the training is done, and its model is worth more
            announcer.failure(f"The report could not be written to {folder}", error)

    def _make_record(self, session: FreezeSession) -> RunRecord:
        model, journal = self._own_model, self._journal
        base = getattr(getattr(model, "config", None), "name_or_path", "") or ""
        run = {
            "name": self.args.run_name or Path(str(self.args.output_dir)).name,
            "model": type(model).__name__ + (f" ({Path(base).name if Path(base).exists() else base})" if base else ""),
            "policy": self._freeze_policy.describe(),
            "samples": len(session.context.source),
            "batch_size": self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            # A folder says nothing elsewhere.
            "settings": self._freeze_config.changed(hidden=("feature_cache_dir",)),
            "versions": {**library_versions(), "hardware": describe_hardware(self.args)},
        }
        return RunRecord(
            run,
            session.chain.names,
            journal.epochs,
            journal.logs(self.state.log_history),
            journal.notes,
            store=None if session.store is None else describe_store(session.store),
            **session.report().to_dict(),
        )


def describe_store(store: FeatureStore) -> dict[str, Any]:
    """Facts of a store for people, by name; sizes in bytes end with `bytes`."""
    manifest, views = store.manifest, store.views.spec
    facts: dict[str, Any] = {
        "cut": manifest.cut,
        "samples": len(store) if store.share is None else manifest.rows,
        "codec": manifest.codec,
        "shape of a feature": " x ".join(map(str, store.codec.layout.shape)),
        "bits a value": f"{store.codec.bits_per_value:.3g}",
        "Arrow files, bytes": store.bytes,
        "augmented views": views.count,
    }
    if views.count:
        stored = "whole" if views.whole or views.channels is None else f"{len(views.channels)} channels"
        facts |= {"stored of each view": stored, "geometry of a view": views.geometry or "none"}
    return facts
