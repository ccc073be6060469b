"""What a store at a cut will be: features, codec, views and fingerprint, from a training's model and settings."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..cache.codec import make_codec
from ..cache.fingerprint import dataset_inputs, fingerprint_inputs, tensors_digest
from ..cache.lossless import LOSSLESS
from ..cache.manifest import FORMAT_VERSION
from ..cache.names import TOKENS
from ..cache.row_files import ROW_FILES
from ..cache.rows import RowError, RowSource
from ..cache.selections import agreed_selection, why_unknown
from ..cache.shares import SHARE, Share, share_rows
from ..cache.sized import SizedBatch, SizeRule, parts_of
from ..cache.store import FeatureStore
from ..cache.texts import split_texts
from ..cache.view_columns import ViewSpec
from ..model.layout import FeatureLayout
from ..model.proving import answers_by_position, is_neutral
from ..rng import preserve_rng
from ..units import parse_bytes
from .context import BuildContext
from .deepening import DEEPENED_FROM, StoreFeatures, deepened
from .errors import OneWidthError
from .feature_sources import ImageFeatures, agree_on_padding, one_width_only
from .fisher import fisher_weights
from .function_pairs import suggest_replayable
from .materialize import spread
from .reuse import StoreReuse, file_notes
from .store_spec import StoreSpec
from .survey import (
    OPAQUE,
    Augmentation,
    choose_channels,
    count_sensitive,
    look_closer,
    make_view_spec,
    ranges_drawn,
    survey,
    tells_geometry,
    why_random_on_device,
)
from .trimming import settle_trimming, stored_source

#: Batches from all over the data on which the loss's sensitivity to each channel is measured.
_WEIGHT_BATCHES = 8
#: Ranges in which the tokens of texts are counted, to tell the size of a store.
_TOKEN_RANGES = 16
#: Entry of a fingerprint's inputs: live epochs wrote the store, not a build.
WRITTEN = "materialize"
#: Entry of a fingerprint's inputs: the only training whose store it is.
_TRAINING = "training"
#: Half precision: an evaluation should report the model, not the codec.
EVALUATION_CODEC = "fp16"
#: A fingerprint's entry `augmentation` for stores of evaluation sets, which are not removed with the training's.
_EVALUATION = {"views": 0, "for": "evaluation"}
#: Settings on which random numbers of opaque transforms and collators depend, see `RowSource`.
_DRAWS = ("seed", "batch_size")


class SpecMaker:
    """Makes the `StoreSpec` of a cut and a codec.

    Args:
        context: the training.
        augmentation: what is random in its samples; None: `look` finds out. That is at the beginning where a mistake
            in the samples would be an error, so that it costs nothing yet.

    Attributes:
        augmentation: what is random; None until somebody has looked. At the beginning the main process alone does.
        weights: by cut, float32 `(C,)` or `(4, C)`, the loss's sensitivity to each channel, for codecs that use it.
            Measured once, so that a store that is lost is built again as it was.
        unknown: stands in fingerprints for what cannot be digested. A resumed training has the same, so that it finds
            its stores again.
        reuse: opens stores of earlier runs.
        selection: of which larger data set the samples are rows; None if they are not.

    Raises:
        ValueError: if the pipelines of a `ReplayableTransform` do not fit each other.

    Shapes: C channels.
    """

    def __init__(self, context: BuildContext, augmentation: Augmentation | None = None):
        self.context = context
        self.augmentation = augmentation
        cache = context.config.cache
        if context.group.is_main and (cache == "always" or (cache == "auto" and tells_geometry(context.source))):
            self.augmentation = self._survey()
        self._looked_closer = False
        self.weights: dict[int, torch.Tensor] = {}
        self.unknown = context.group.broadcast(uuid.uuid4().hex)
        self.reuse = StoreReuse(replace(context, group=context.disk), self._draws_once)
        self._notes: Mapping[str, Any] = {}
        self.selection = agreed_selection(context.source.dataset, context.group)
        self._whole = None if self.selection is None else self.selection.source(context.source)
        self._share: tuple[Share, RowSource] | None = None
        #: By data set, and by cut where that counts.
        self._tokens: dict[tuple[int, int], tuple[RowSource, float]] = {}

    def look(self) -> Augmentation:
        """What is random in the samples, on all processes.

        Raises:
            ValueError: if the pipelines of a `ReplayableTransform` do not fit each other.
        """
        self.augmentation = found = self.context.group.on_main(self._survey)
        return found

    def _survey(self) -> Augmentation:
        if self.augmentation is not None:
            return self.augmentation
        context = self.context
        with preserve_rng():
            found = survey(context.source, context.chain.main_input)
            on_device = why_random_on_device(context.model_inputs, context.source.probe())
        if on_device is not None and found.declined is None:
            return Augmentation(declined=on_device)
        return self._with_advice(found)

    def _with_advice(self, found: Augmentation) -> Augmentation:
        if found != OPAQUE:
            return found
        line = suggest_replayable(self.context.source.dataset, self.context.eval_dataset)
        if line is None:
            return found
        return replace(found, why_not=f"{found.why_not} (set_transform({line}) on the train data makes it one)")

    @property
    def ranges_to_look_at(self) -> float:
        """How many ranges of samples are yet to be drawn to see what is random; known to the main process."""
        source, looked = self.context.source, self.augmentation
        survey_left = 0.0 if looked is not None else ranges_drawn(source, closer=False)
        is_closed = self._looked_closer or (looked is not None and looked.random) or not self.context.config.views
        return survey_left + (0.0 if is_closed else ranges_drawn(source, closer=True))

    def make(self, cut: int, codec: str) -> StoreSpec:
        """The spec of the training's store at a cut, before sensitive channels are chosen.

        Raises:
            ChainError: if the cut fails the proof on this training's data.
            RowError: if steps would run the frozen part of a split model to learn the sizes of features.
        """
        context = self.context

        def prove() -> bool:
            samples = (
                context.source
                if context.chain.padding.has_sizes(cut)
                else stored_source(context.chain, cut, context.source)
            )
            probe = context.model_inputs(samples.probe())
            # Traced again: mixed precision set up since the training began may change the type of the features.
            context.chain.trace(probe)
            context.chain.prove(probe, cut)
            return is_neutral(context.chain, probe, cut)

        neutral = context.group.on_all(prove)
        agree_on_padding(context.chain, cut, context.group)
        self.look()
        self.settle_padding(cut)
        if context.is_split and context.chain.padding.is_any_size(cut):
            raise RowError("samples have several sizes, and FSDP2 splits the blocks that tell how large features are")
        self._look_closer()
        made_from = context.group.on_main(
            lambda: self._made_from(context.source, cut, codec, self._augmentation_settings(), self._draws(), neutral)
        )
        draft = context.group.on_all(lambda: self.draft(cut, codec))
        return self.with_codec(replace(draft, made_from=made_from), codec)

    def settle_padding(self, cut: int) -> None:
        """Finds out how features that include padding are stored, on all processes together; `look` comes before.

        Args:
            cut: from 1 on.

        Raises:
            OneWidthError: if samples are not of one width, padding counts, and features cannot be trimmed.
        """
        if self._includes_padding(cut):
            settle_trimming(self.context, cut)
        self._check_width(cut)

    def _check_width(self, cut: int) -> None:
        """Raises OneWidthError if it is known that features at a cut have no common width."""
        chain = self.context.chain
        if self._includes_padding(cut) and chain.padding.why_not_trimmed(cut) is not None:
            raise OneWidthError(one_width_only(chain, cut, self.context.source))

    def _includes_padding(self, cut: int) -> bool:
        """Whether samples are padded to the longest of a batch, and features include that.

        They include it, too, where samples are random: views of them are stored whole.
        """
        chain, augmentation = self.context.chain, self.augmentation
        if augmentation is None or not cut:
            return False
        if augmentation.random and chain.padding.ignored(cut):
            chain.padding.keep(cut, "samples are random")
        return augmentation.padded and not chain.padding.ignored(cut)

    def _look_closer(self) -> None:
        """Looks for rare randomness, once, before anything is stored as if there were none."""
        if self._looked_closer or self._augmentation.random or not self.context.config.views:
            return

        def look() -> Augmentation | None:
            with preserve_rng():
                main_input = self.context.chain.main_input
                found = look_closer(self.context.source, main_input if self._augmentation.padded else None)
            return None if found is None else self._with_advice(found)

        found = self.context.group.on_main(look)
        self.augmentation, self._looked_closer = found or self.augmentation, True

    def make_evaluation(
        self, source: RowSource, probe: Mapping[str, Any], cut: int, limit: int | None, random: bool
    ) -> StoreSpec:
        """The spec of the store of an evaluation set.

        Args:
            source: the samples.
            probe: a few of them as the prefix's inputs; the chain is traced on them.
            cut: frozen blocks.
            limit: most bytes of its files.
            random: whether something is drawn in the samples.

        Raises:
            ChainError: if the cut fails the proof on these samples.
            RowError: if metrics may read what no store holds.
        """
        context = self.context
        context.group.on_all(lambda: context.chain.prove(probe, cut))
        neutral = context.group.on_all(lambda: is_neutral(context.chain, probe, cut))
        agree_on_padding(context.chain, cut, context.group)
        if context.chain.padding.is_any_size(cut):
            raise RowError(
                "the features of the training set are those of batches of several sizes: stores of evaluation sets "
                "have one"
            )
        if context.chain.padding.ignored(cut) and answers_by_position(context.chain, probe):
            raise RowError(
                "the model answers for each position of a text, padding included, which no store holds: a metric may "
                "read it"
            )
        draws = _DRAWS if random else ()
        made_from = context.group.on_main(
            lambda: self._made_from(source, cut, EVALUATION_CODEC, _EVALUATION, draws, neutral)
        )
        spec = context.group.on_all(lambda: self._draft(source, cut, EVALUATION_CODEC, ViewSpec()))
        notes = context.group.on_main(lambda: file_notes(source.dataset, context.config.reuse))
        return replace(spec, made_from=made_from, limit=limit, notes=notes)

    def draft(self, cut: int, codec: str) -> StoreSpec:
        """A spec without a fingerprint, for measuring. Where nobody has looked, it is as if nothing was random.

        Args:
            cut: frozen blocks; the chain is traced.
            codec: name of the codec.
        """
        views = self._view_spec(self.context.chain.stored_layout(cut), codec)
        return self._draft(self.context.source, cut, codec, views)

    def of_whole(self, spec: StoreSpec) -> StoreSpec | None:
        """The spec of the store of all rows that the samples are selected from; nobody owns it.

        None if they are not selected, that is the spec itself, or the samples have not the same features there: where
        something is drawn for a row number, rows are as wide as the widest, or have sizes of their own. None, too, if
        a table that the rows were cut from holds others by now.

        Args:
            spec: what `make` returned.
        """
        whole = self._whole
        context, is_drawn = self.context, self._augmentation.random
        if whole is None or self.is_of_whole(spec) or is_drawn or context.chain.padding.is_any_size(spec.cut):
            return None
        if not context.group.on_main(lambda: self._is_proved):
            return None
        inputs = context.group.on_main(lambda: dataset_inputs(whole, self.unknown))
        draft = context.group.on_all(lambda: self._draft(whole, spec.cut, spec.codec, spec.views))
        return replace(draft, made_from={**spec.made_from, **inputs}, weights=spec.weights)

    def why_not_of_whole(self) -> str | None:
        """Why nothing tells of which rows the samples are a range, if they are one, as the end of a sentence."""
        if not self._is_proved:
            return "the file that it is read from holds other rows than when it was opened"
        return why_unknown(self.context.source.dataset)

    @property
    def _is_proved(self) -> bool:
        return self.selection is None or self.selection.is_proved

    def is_of_whole(self, spec: StoreSpec) -> bool:
        """Whether the spec's store has all rows that the samples are selected from."""
        return self._whole is not None and spec.source is self._whole

    def of_share(self, spec: StoreSpec, share: Share) -> StoreSpec:
        """The spec of a store of some of the rows, which a node with a disk of its own stores.

        Args:
            spec: what `make` returned, of samples of one size.
            share: of this process's node.
        """
        context = self.context
        if self._share is None or self._share[0] != share:
            self._share = share, share_rows(context.source, share)
        rows = self._share[1]
        inputs = context.disk.on_main(lambda: dataset_inputs(rows, self.unknown))
        draft = context.group.on_all(lambda: self._draft(rows, spec.cut, spec.codec, spec.views))
        made_from = {**spec.made_from, **inputs, SHARE: share.to_json()}
        return replace(draft, made_from=made_from, weights=spec.weights)

    def rows_of(self, store: FeatureStore, spec: StoreSpec) -> FeatureStore:
        """A store of a spec as the rows of the samples."""
        if self._share is not None and spec.source is self._share[1]:
            return store.spread(self._share[0])
        return store.select(self.selection.rows) if self.selection and self.is_of_whole(spec) else store

    def with_codec(self, spec: StoreSpec, codec: str) -> StoreSpec:
        """The same features with another codec."""
        made_from, weights = {**spec.made_from, "codec": codec}, None
        made_from.pop("channel_weights", None)
        if make_codec(codec, spec.layout).uses_weights:
            weights = self._channel_weights(spec.cut)
            made_from["channel_weights"] = tensors_digest({"weights": weights})
        views = self._view_spec(spec.layout, codec)
        return replace(spec, codec=codec, made_from=made_from, weights=weights, views=views, notes={})

    def written(self, spec: StoreSpec) -> StoreSpec:
        """The same store, written by live epochs; one of this training alone if nobody can draw its rows again."""
        made_from = {**spec.made_from, WRITTEN: "write_through"}
        if self._draws_once(made_from):
            made_from[_TRAINING] = self.unknown
        return replace(spec, made_from=made_from)

    def deepened(self, spec: StoreSpec, store: FeatureStore) -> StoreSpec:
        """The same store, made from one at an earlier cut instead of from samples; see `build.deepening.deepened`."""
        context = self.context
        return deepened(spec, store, context.model_inputs, context.device, context.count_run)

    def deepened_name(self, spec: StoreSpec, parent: str) -> StoreSpec:
        """The spec under the fingerprint of a store that was made from `parent`, which need not exist any more."""
        return replace(spec, made_from={**spec.made_from, DEEPENED_FROM: parent})

    def settle(self, spec: StoreSpec) -> StoreSpec:
        """Chooses the sensitive channels and describes the files of the rows, on the main process.

        Raises:
            GeometryMisfit: on every process, if a view's geometry cannot be stored as the spec says.
        """

        context, config = self.context, self.context.config

        def choose() -> ViewSpec:
            with preserve_rng():
                settled = choose_channels(spec, config.similarity, config.sensitivity_batches, config.channel_map)
            self._notes = settled.notes  # pictures stay here: the main process writes them
            return settled.views

        views = context.group.on_main(choose)
        files = context.group.on_all(lambda: self._file_notes(spec) if context.disk.is_main else {})
        return replace(spec, views=views, notes={**self._notes, **files})

    def _file_notes(self, spec: StoreSpec) -> Mapping[str, Any]:
        if isinstance(spec.feature_source, StoreFeatures):  # it was read when the store before was made
            note = spec.feature_source.store.read_note(ROW_FILES)
            return {} if note is None else {ROW_FILES: note}
        return file_notes(spec.source.dataset, self.context.config.reuse)

    def _draft(self, source: RowSource, cut: int, codec: str, views: ViewSpec) -> StoreSpec:
        context = self.context
        self._check_width(cut)
        layout, source = context.chain.stored_layout(cut), stored_source(context.chain, cut, source)
        return StoreSpec(
            chain=context.chain,
            cut=cut,
            source=source,
            codec=codec,
            layout=layout,
            views=views,
            made_from={},
            directory=context.cache_dir,
            feature_source=ImageFeatures(context.chain, cut, source, layout, context.model_inputs, context.count_run),
            disable_tqdm=context.disable_tqdm,
            lossless=context.config.lossless,
            tokens=self._mean_tokens(source, cut) if layout.is_token else 1.0,
        )

    def _mean_tokens(self, source: RowSource, cut: int) -> float:
        """Mean number of tokens, or positions, of samples from all over the data; the same on all processes."""
        key = id(source), cut if isinstance(source.rule, SizeRule) else 0
        if key not in self._tokens:
            with preserve_rng():
                batches = [source.collate(source.rows(number)) for number in spread(source.num_ranges, _TOKEN_RANGES)]
                lengths = [self._count_tokens(batch, source, cut) for batch in batches]
            self._tokens[key] = source, float(torch.cat(lengths).double().mean())
        return self._tokens[key][1]

    def _count_tokens(self, batch: Any, source: RowSource, cut: int) -> torch.Tensor:
        if not isinstance(batch, SizedBatch):
            return split_texts(batch, source.texts).columns[TOKENS]
        padding, inputs = self.context.chain.padding, self.context.model_inputs
        return torch.cat(
            [torch.full((len(places),), padding.positions(inputs(part), cut)) for places, part in batch.parts]
        )

    def _made_from(
        self,
        source: RowSource,
        cut: int,
        codec: str,
        augmentation: Mapping[str, Any],
        draws: Collection[str],
        neutral: bool,
    ) -> dict[str, Any]:
        chain = self.context.chain
        inputs = fingerprint_inputs(
            source=source,
            model=chain.model,
            tensors=chain.prefix_state(cut),
            cut=cut,
            blocks=chain.names[:cut],
            codec=codec,
            augmentation=augmentation,
            precision=self.context.precision,
            format_version=FORMAT_VERSION,
            modules=chain.prefix_modules(cut),
            draws=draws,
            unknown=self.unknown,
            neutral=neutral,
        )
        if self.context.config.reuse == "never":
            inputs[_TRAINING] = self.unknown
        rule = stored_source(chain, cut, source).rule
        if rule is not None:
            inputs |= rule.of(chain.inputs_of(cut)).constants
        return {**inputs, **LOSSLESS} if self.context.config.lossless else inputs

    def _channel_weights(self, cut: int) -> torch.Tensor:
        """Measured where the first spec needs them; the same ever after, though the suffix goes on learning."""
        source = stored_source(self.context.chain, cut, self.context.source)

        def measure() -> torch.Tensor:
            numbers = spread(source.num_ranges, min(_WEIGHT_BATCHES, source.num_ranges))
            drawn = (source.collate(source.rows(number)) for number in numbers)
            batches = (self.context.model_inputs(part) for batch in drawn for part in parts_of(batch))
            return fisher_weights(self.context.chain, cut, batches, source.seed, bands=True)

        if cut not in self.weights:
            self.weights[cut] = self.context.group.on_main(measure)
        return self.weights[cut]

    def _view_spec(self, layout: FeatureLayout, codec: str) -> ViewSpec:
        config, rows = self.context.config, len(self.context.source)
        limit = None if config.sensitive_budget is None else parse_bytes(config.sensitive_budget)
        count = count_sensitive(codec, layout, rows, config.views, config.sensitive_fraction, limit)
        return make_view_spec(self.augmentation or Augmentation(), layout, config.views, count)

    def _draws_once(self, made_from: Mapping[str, Any]) -> bool:
        """Whether live epochs draw the samples of a store, in batches that do not come again."""
        return WRITTEN in made_from and self._augmentation.random and not self._augmentation.replayable

    @property
    def _augmentation(self) -> Augmentation:
        if self.augmentation is None:
            raise RuntimeError("nobody has looked what is random in the samples.")
        return self.augmentation

    def _draws(self) -> Collection[str]:
        """The settings on which the random numbers in the rows of a store depend."""
        if not self._augmentation.random:
            return ()
        if not self._augmentation.replayable:
            return _DRAWS
        return ("seed",) if self.context.config.views else ()

    def _augmentation_settings(self) -> dict[str, Any]:
        """The settings that decide which views a store holds."""
        config = self.context.config
        if not self._augmentation.random or not config.views:
            return {"views": 0}
        if not self._augmentation.replayable:
            return {"views": config.views}
        names = ("views", "sensitive_fraction", "sensitive_budget", "similarity", "sensitivity_batches", "channel_map")
        return {name: getattr(config, name) for name in names}
