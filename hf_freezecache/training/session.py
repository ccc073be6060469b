"""One training's moving parts wired together: the chain, the cut, the store, and where batches come from."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..augment.mixing import add_noise
from ..build.spec_maker import SpecMaker
from ..cache.rows import RowSource, split_batch
from ..cache.store import FeatureStore
from ..config import FreezeCacheConfig
from ..distributed import Group, rewrap_ddp
from ..model.chain import BlockChain
from ..model.layout import FeatureLayout
from ..model.tracing import eval_mode, main_input_name
from ..policies import Moment, ObservedBlock
from ..replay.collator import take_codes, take_drawn
from ..replay.dataset import SourceSwitch
from ..replay.decode import replay_features
from ..rng import preserve_rng
from .accounting import Ledger, Phase, counting_flops, measure_forward_flops, measure_training_flops
from .evaluation import EvaluationCache
from .report import FreezeCacheReport, FreezeStatus, count_trainable, make_report
from .store_keeper import StoreKeeper
from .write_through import WriteThrough

logger = logging.get_logger(__name__)


class FreezeSession:
    """The state of one training, from `train()` to its end.

    Args:
        model: the model itself, not wrapped.
        source: the train samples as model inputs.
        config: the user's settings.
        explicit: whether the user gave them.
        cache_dir: where stores lie.
        group: the processes.
        to_device: moves a batch to where the model is.
        label_names: model inputs that only the loss takes.
        precision: mixed precision of the training.
        disable_tqdm: no progress bars.
        can_cache: False where features cannot be replayed (DataParallel).
        evaluates_on_images: why evaluations cannot be from a store; None if they can.

    Raises:
        ChainError: if the model cannot be split.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        source: RowSource,
        config: FreezeCacheConfig,
        explicit: bool,
        cache_dir: Path,
        group: Group,
        to_device: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        label_names: Sequence[str],
        precision: str,
        disable_tqdm: bool,
        can_cache: bool = True,
        evaluates_on_images: str | None = None,
    ):
        self.model, self.source, self.config, self.group = model, source, config, group
        self.to_device, self.can_cache, self.label_names = to_device, can_cache, frozenset(label_names)
        self.ledger = Ledger()
        self.switch = SourceSwitch()
        self.store: FeatureStore | None = None
        self.in_step = False
        self.optimizer: Any = None
        self.wrapped_model: nn.Module = model
        self._declined_cut = -1
        self._flops: dict[tuple[int, str], float] = {}
        self._flops_seen, self._samples_seen = 0.0, 0
        self._activations: dict[int, torch.Tensor] = {}
        self._observers: list[Any] = []
        with preserve_rng():
            split_batch(source.probe(), main_input_name(model))  # a clear error before the model sees the batch
            self._settle_labels()
            self.probe = self._probe()
            self.chain = BlockChain.from_model(model, config.blocks, probe=self.probe)
        self.spec_maker = SpecMaker(
            model=model,
            chain=self.chain,
            source=source,
            config=config,
            cache_dir=cache_dir,
            group=group,
            model_inputs=self._model_inputs,
            precision=precision,
            disable_tqdm=disable_tqdm,
        )
        self.caching = StoreKeeper(self.spec_maker, explicit)
        self.write_through = WriteThrough(self.caching, self.chain, self.switch, self._model_inputs)
        #: None where evaluations run on images, and after the training.
        self.evaluation: EvaluationCache | None = None
        if config.cache_eval:
            self._cache_evaluations(evaluates_on_images)

    # What the callback calls

    @property
    def num_blocks(self) -> int:
        return len(self.chain)

    def agree(self, value: Any) -> Any:
        return self.group.broadcast(value)

    def begin_epoch(self, moment: Moment, epochs_left: float) -> None:
        """Brings the cut to `moment.cut`, then the source: a store where one pays, images otherwise."""
        self.ledger.end_all()
        self.switch.epoch = moment.epoch
        if self.chain.cut == 0:
            self.flops_per_sample("live")  # what plain training costs, for the report
        if moment.cut > self.chain.cut:
            self._freeze(moment.cut)
            rewrap_ddp(self.wrapped_model)
            log = logger.info if self.group.rank == 0 else logger.debug
            log(
                f"Epoch {moment.epoch}: froze {moment.cut} of {len(self.chain)} blocks, up to "
                f"'{self.chain.names[moment.cut - 1]}'."
            )
        if moment.cut:
            self._choose_source(moment, epochs_left)
        mode = "live" if self.switch.path is None else "replay"
        phase = self.ledger.begin(self.chain.cut, mode)
        if mode == "replay":
            phase.store_bytes = self.store.bytes
        elif self.write_through.running:
            phase.store_bytes = self.write_through.bytes

    def end_epoch(self) -> None:
        if self.ledger.current is not None:
            self.ledger.current.epochs += 1
            self.ledger.end()

    def end_step(self) -> None:
        if self.ledger.current is not None:
            self.ledger.current.steps += 1
            self.ledger.sample_memory()

    def watch(self, signals: frozenset[str]) -> None:
        """Starts to record activations, if they are among the signals."""
        if "activations" in signals and not self._observers:
            self._record_activations()

    def observed_blocks(self) -> list[ObservedBlock]:
        """The live blocks for a policy."""
        blocks = []
        for index, block in enumerate(self.chain.blocks):
            if index >= self.chain.cut:
                parameters = {
                    f"{position}.{name}": parameter
                    for position, module in enumerate(block.modules)
                    for name, parameter in module.named_parameters()
                }
                blocks.append(ObservedBlock(index, block.name, parameters, self._activations.get(index)))
        self._activations.clear()
        return blocks

    def state(self) -> dict[str, Any]:
        return {
            "declined_cut": self._declined_cut,
            "caching": self.caching.state(),
            "phases": self.ledger.state(),
            "samples": self._samples_seen,
            "plain_flops_per_sample": self._flops.get((0, "live")),
            "write_through": self.write_through.state(),
        }

    # What the trainer calls

    def restore(self, cut: int, state: Mapping[str, Any]) -> None:
        """Continues a training from a checkpoint: freezes what was frozen there."""
        self._declined_cut = state.get("declined_cut", -1)
        self.caching.restore(state.get("caching", {}))
        self.ledger.load(state.get("phases", []))
        self._samples_seen = state.get("samples", 0)
        if state.get("plain_flops_per_sample") is not None:
            self._flops[0, "live"] = state["plain_flops_per_sample"]
        if self._samples_seen and "write_through" in state:  # a new training begins with an empty state of its own
            self.write_through.load(cut, state["write_through"])
        if cut:
            self._freeze(cut)

    def prepared(self, optimizer: Any, wrapped_model: nn.Module) -> None:
        """Optimizer and model as accelerate has wrapped them."""
        self.optimizer, self.wrapped_model = optimizer, wrapped_model
        if self.chain.cut:
            rewrap_ddp(wrapped_model)  # a wrapper kept from an earlier training does not know of this freeze

    def stop(self) -> None:
        """The training has ended or broken off; status and report stay."""
        self.ledger.end_all()
        if self.evaluation is not None:
            self.evaluation.stop()
            self.evaluation = None
        self.write_through.close()
        for handle in self._observers:
            handle.remove()
        self._observers.clear()

    def close(self) -> None:
        """Makes room for another training: every parameter gets back the `requires_grad` that the user had set."""
        self.stop()
        self.chain.unfreeze()
        rewrap_ddp(self.wrapped_model)  # `Trainer` keeps the wrapper for the next training

    @contextlib.contextmanager
    def training_step(self, inputs: Mapping[str, Any], force_eager: bool) -> Iterator[Mapping[str, Any]]:
        """Yields the inputs for one training step, with features for the main input where the prefix is bypassed.

        Args:
            inputs: a live batch as it is, a replayed one, or one whose features are written to a store.
            force_eager: run compiled code uncompiled where the prefix is bypassed.
        """
        taken, drawn = take_codes(inputs), take_drawn(inputs)
        self.in_step = True
        try:
            if taken is None and drawn is None:
                yield inputs
                return
            if taken is not None:
                codes, others = taken
                cut, features = self.store.manifest.cut, replay_features(self.store, self.to_device(codes))
            else:
                views, batch = drawn
                cut, features = self.chain.cut, self.write_through.features(views, batch)
                others = {name: value for name, value in batch.items() if name != self.chain.main_input}
            if self.config.feature_noise:
                features = add_noise(features, self.config.feature_noise)
            eager = torch.compiler.set_stance("force_eager") if force_eager else contextlib.nullcontext()
            with self.chain.replay(cut), eager:
                yield {self.chain.main_input: features, **others}
        finally:
            self.in_step = False

    def prepare_evaluation(self, loader: DataLoader) -> None:
        """Gets the store that an evaluation will read, before its clock begins."""
        if not self.evaluation.needs_store(loader):
            return
        with self.ledger.phase(self.chain.cut, "build") as phase:
            store = self.evaluation.prepare(loader)
            self._book_runs(phase)
            if store is not None:
                phase.epochs += 1
                phase.store_bytes += store.bytes

    @contextlib.contextmanager
    def evaluation_loop(self, loader: DataLoader) -> Iterator[Callable[[int], None]]:
        """Books one evaluation, from the loader's store if there is one; yields what takes its number of samples."""
        replays = self.evaluation is not None and self.evaluation.replays(loader)
        with self.ledger.phase(self.chain.cut, "eval") as phase:
            samples: list[int] = []
            with self.evaluation.replaying(loader) if replays else contextlib.nullcontext():
                yield samples.append
            phase.epochs += 1
            flops = self.flops_per_sample("eval_replay" if replays else "eval")
            phase.flops += flops * sum(samples) / self.group.size

    def layout_of(self, inputs: Mapping[str, Any]) -> FeatureLayout | None:
        """Layout of the features that stand for a batch's main input in its training step; None if none do."""
        if take_drawn(inputs) is not None:
            return self.write_through.layout
        return None if take_codes(inputs) is None else self.store.codec.layout

    def before_forward(self) -> None:
        """After `model.train()`: what is frozen goes back to eval mode."""
        if self.in_step:
            self.chain.eval_prefix()

    def step_flops(self, inputs: Mapping[str, Any]) -> float:
        """FLOPs of one micro-batch, measured once per cut and mode."""
        taken = take_codes(inputs)
        mode, batch = ("live", inputs) if taken is None else ("replay", taken[0])
        samples = len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
        flops = self.flops_per_sample(mode) * samples
        if self.ledger.current is not None:
            self.ledger.current.flops += flops
        self._samples_seen += samples
        return flops

    def flops_per_sample(self, mode: str, cut: int | None = None) -> float:
        """FLOPs of one sample in a training step (live, replay), in a build, or in evaluation (eval, eval_replay)."""
        cut = self.chain.cut if cut is None else cut
        if (cut, mode) not in self._flops:
            with preserve_rng():
                self._flops[cut, mode] = self._measure_flops(mode, cut)
        return self._flops[cut, mode]

    def take_build_flops(self) -> float:
        """FLOPs of the builds since the last call, for `total_flos`."""
        flops, self._flops_seen = self._flops_seen, 0.0
        return flops

    def status(self) -> FreezeStatus:
        cut = self.chain.cut
        return FreezeStatus(
            cut=cut,
            frozen_blocks=self.chain.names[:cut],
            trainable_parameters=count_trainable(self.model),
            replaying=self.switch.path is not None,
            store_path=None if self.store is None else self.store.path,
            store_bytes=0 if self.store is None else self.store.bytes,
        )

    def report(self) -> FreezeCacheReport:
        phases = self.ledger.phases
        plain = self._flops.get((0, "live"))
        steps = sum(phase.steps for phase in phases if phase.mode in ("live", "replay"))
        per_step = None if plain is None or not steps else plain * self._samples_seen / steps
        return make_report(phases, per_step)

    # Freezing

    def _freeze(self, cut: int) -> None:
        for parameter in self.chain.freeze(cut):
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)
        # BatchNorm statistics differ between processes until they are sent around: one prefix for all.
        self.group.broadcast_tensors(list(self.chain.prefix_buffers(cut).values()))

    # Caching

    def _choose_source(self, moment: Moment, epochs_left: float) -> None:
        if self.config.cache == "never" or not self.can_cache or self._declined_cut == moment.cut:
            self.switch.set(None)
            return
        if self.store is not None and self.store.manifest.cut == moment.cut:
            return
        self.switch.set(None)
        self.store = None
        with self.ledger.phase(moment.cut, "build") as phase, preserve_rng():
            store, built = self.write_through.obtain(moment.cut, epochs_left)
            self._book_runs(phase)
            if built:
                phase.epochs += 1
                phase.store_bytes = store.bytes
        if store is None:
            self._declined_cut = -1 if self.write_through.running else moment.cut
            return
        self.store = store
        self.switch.set(store.path)

    def _book_runs(self, phase: Phase) -> None:
        """Books what builds have run since the last call."""
        for (start, end), samples in self.spec_maker.samples_run.items():
            before = self.flops_per_sample("build", start) if start else 0.0
            flops = (self.flops_per_sample("build", end) - before) * samples
            phase.flops += flops
            self._flops_seen += flops
        self.spec_maker.samples_run.clear()

    def _cache_evaluations(self, evaluates_on_images: str | None) -> None:
        if self.config.cache == "never":
            evaluates_on_images = "cache='never'"
        if evaluates_on_images is not None or not self.can_cache:
            if evaluates_on_images is not None and self.group.rank == 0:
                logger.warning(f"cache_eval: evaluations during training run on images ({evaluates_on_images}).")
            return
        self.evaluation = EvaluationCache(self.spec_maker, self.caching.holdings, self.to_device)

    # Helpers

    def _probe(self) -> Mapping[str, Any]:
        return self._model_inputs(self.source.probe())

    def _settle_labels(self) -> None:
        """Labels are the loss's, which may be the user's own: the prefix sees them only if the model needs them."""
        try:
            with torch.no_grad(), eval_mode(self.model):
                self.model(**self._probe())
        except Exception:  # whatever a model raises that was called without its labels
            self.label_names = frozenset()

    def _model_inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of a collated batch the model takes for its prefix, on the model's device."""
        accepted = inspect.signature(type(self.model).forward).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        return self.to_device(
            {
                name: value
                for name, value in batch.items()
                if name not in self.label_names and (takes_all or name in accepted)
            }
        )

    def _measure_flops(self, mode: str, cut: int) -> float:
        if mode == "live":
            return measure_training_flops(self.model, self.probe)
        if mode == "eval":
            return measure_forward_flops(self.model, self.probe)
        rows = len(self.probe[self.chain.main_input])
        if mode == "build":
            with counting_flops() as counter:
                features = self.chain.prefix(self.probe, cut)
            return counter.get_total_flops() / rows
        features = self.chain.prefix(self.probe, cut)
        measure = measure_forward_flops if mode == "eval_replay" else measure_training_flops
        with self.chain.replay(cut):
            return measure(self.model, {**self.probe, self.chain.main_input: features})

    def _record_activations(self) -> None:
        def keep(index):
            def hook(module, args, output):
                if self.in_step:
                    value = output if isinstance(output, torch.Tensor) else output[0]
                    self._activations[index] = value.detach()

            return hook

        for index, block in enumerate(self.chain.blocks):
            self._observers.append(block.modules[-1].register_forward_hook(keep(index)))
