"""Whether the store of a cut pays: seen as early, and with as little measuring, as that can be told."""

from __future__ import annotations

from collections.abc import Callable

from transformers.utils import logging

from ..build.spec_maker import SpecMaker
from ..build.store_spec import StoreSpec
from ..cache.rows import RowError
from ..distributed import Announcer, describe_error
from ..estimate.costs import PlanRow
from ..estimate.pace import Pace
from ..estimate.probing import Prober
from ..units import show_bytes, show_seconds

logger = logging.get_logger(__name__)


class Declined(Exception):
    """No store is built; the message is the reason, as the end of a sentence."""


class StoreWorth:
    """Decides under `cache="auto"`; with "always", every store pays.

    Args:
        spec_maker: describes the stores.
        announcer: tells the decision.
    """

    def __init__(self, spec_maker: SpecMaker, announcer: Announcer):
        self.spec_maker, self.announcer, context = spec_maker, announcer, spec_maker.context
        self.config, self.group, self.cache_dir = context.config, context.group, context.cache_dir
        self._remote = context.remote
        self._num_blocks = len(context.chain)
        self._prober = Prober(context)

    @property
    def is_asked(self) -> bool:
        """Whether stores are built only where they pay."""
        return self.config.cache != "always"

    def why_hopeless(self, cut: int, epochs_left: float, pace: Pace | None = None) -> str | None:
        """Why no store pays at a cut, where that is clear before anything is proved, measured or read for it.

        Args:
            cut: frozen blocks.
            epochs_left: epochs of training that remain at this cut.
            pace: of the live epochs before; None if there were none.

        Returns:
            The reason, as the end of a sentence; None where a store may pay, or be there already.
        """

        def look() -> str | None:
            if self.may_be_there():
                return None
            looks = self.spec_maker.ranges_to_look_at
            try:
                return self._prober.why_hopeless(self._draft(cut), epochs_left, pace, looks)
            except RowError as error:  # samples that cannot be stored
                return str(error).rstrip(".")

        return self.group.on_main(look) if self.is_asked else None

    def check_early(self, cut: int, epochs_left: float, pace: Pace | None) -> None:
        """Measures before the samples are looked at closer and what identifies a store is digested.

        Where there are stores, that comes first: the right one may be among them.

        Raises:
            Declined: if no store would pay.
        """
        if self.is_asked and not self.group.on_main(self.may_be_there):
            self.spec_maker.look()
            self.spec_maker.settle_padding(cut)
            self._measure(lambda: self._draft(cut), epochs_left, None, pace)

    def check(self, spec: StoreSpec, epochs_left: float, limit: int | None, pace: Pace | None) -> None:
        """Measures what a store would cost and save; what was measured for its like before counts.

        Args:
            spec: the build.
            epochs_left: epochs of training that remain.
            limit: bytes that the store may take; None: there is no limit.
            pace: of the live epochs before; None if there were none.

        Raises:
            Declined: if it would not pay.
        """
        if not self.is_asked:
            return
        row = self._measure(lambda: spec, epochs_left, limit, pace)
        others = f" for all rows, {show_seconds(row.own_build_seconds)} of it for this training's" * (row.shared > 1)
        self.announcer.warning_once(
            f"Cut {spec.cut}: {row.codec}, {show_bytes(row.bytes)} (base {show_bytes(row.base_bytes)}, views "
            f"{show_bytes(row.view_bytes)}); a build takes about {show_seconds(row.build_seconds)}{others} and saves "
            f"{show_seconds(row.seconds_saved_per_epoch)} in each of {epochs_left:.3g} epochs left: it pays."
        )

    def _measure(
        self, make_spec: Callable[[], StoreSpec], epochs_left: float, limit: int | None, pace: Pace | None
    ) -> PlanRow:
        def measure() -> tuple[str | None, PlanRow | None]:
            try:
                looks = self.spec_maker.ranges_to_look_at
                refusal, row = self._prober.refuse(make_spec(), epochs_left, limit, pace, looks)
                return refusal and refusal + self._of_whole_draws(), row
            except (RuntimeError, OSError) as error:  # out of memory is not worth a training
                Announcer.trace(logger, "What a store would save could not be measured", error)
                return f"the time that it would save could not be measured: {describe_error(error)}", None

        reason, row = self.group.on_main(measure)
        if reason is not None or row is None:
            raise Declined(reason)
        return row

    def _of_whole_draws(self) -> str:
        """What makes a store larger than it need be, as the end of a sentence; known to the main process."""
        found = self.spec_maker.augmentation
        if found is None or not found.random or found.replayable:
            return ""
        return f" (of whole draws, because {found.why_not})"

    def may_be_there(self) -> bool:
        """Whether there are stores, of which one may be the right one."""
        if self.cache_dir.exists() and next(self.cache_dir.iterdir(), None) is not None:
            return True
        return self._remote is not None and self._remote.has_stores()

    def _draft(self, cut: int) -> StoreSpec:
        return self.spec_maker.draft(cut, self.config.codec_at(cut, self._num_blocks))
