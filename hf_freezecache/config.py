"""Every knob of the library, as one dataclass that works in `HfArgumentParser`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch

from .augment.sensitivity import SIMILARITIES, Similarity
from .cache.codec import CODEC_NAMES, check_codec_name, make_codec
from .cache.codec.progression import Progression
from .cache.urls import check_url, is_url
from .model.layout import FeatureLayout
from .policies import SETTLING, ManualPolicy
from .policies.around import layer_factor
from .policies.schedule import format_freeze_points
from .units import parse_bytes

PolicyName = Literal["none", "manual", "linear", "auto", "freezeout", "autofreeze", "egeria", "simfreeze", "smartfrz"]
CacheMode = Literal["auto", "always", "never"]
MaterializeMode = Literal["upfront", "write_through"]
DeepenMode = Literal["raw", "cache"]
MismatchMode = Literal["fallback", "error"]
ReportMode = Literal["none", "json", "html"]
ReuseMode = Literal["never", "proved", "content"]
HeadStartMode = Literal["new", "always"]
AnnealMode = Literal["none", "cosine"]
CacheScope = Literal["shared", "node"]
#: Policies that look which blocks have settled, and need no other limit.
LOOKING = (*SETTLING, "smartfrz")
#: Fraction of the blocks that the others freeze, at most, where the settings do not say it.
MAX_FROZEN = 0.75
#: Epochs of a head start where the settings do not say it; measured in `benchmarks/headline`.
HEAD_START_EPOCHS = 2
#: Folder of the stores in a training's output folder.
CACHE_FOLDER = "_freeze_cache"
#: Settings that need rows which lie on the disks of other nodes, and why.
_NOT_OF_NODES = {
    "materialize": (
        "write_through",
        "live epochs compute a row's features wherever the sampler sends it, not on the node that stores it",
    ),
    "deepen": (
        "cache",
        "rows are dealt anew at each build, so that the store before holds other rows than a node needs",
    ),
    "share_store": (True, "a store of all rows lies on no node"),
    "cache_eval": (True, "an evaluation reads its rows in their order, whichever node stores them"),
}
_ANY_LAYOUT = FeatureLayout((4, 4, 4), (4, 4), 0, torch.float32)


@dataclass
class FreezeCacheConfig:
    """When to freeze, and how the frozen part's features are kept.

    Epochs count from 0 and a cut takes effect at the beginning of an epoch. A cut counts the frozen blocks from the
    input, stem included.

    Raises:
        ValueError: on construction, if a value is not possible; the message says what is.
        ImportError: on construction, if the codec's library is not installed.
    """

    policy: PolicyName = field(default="linear", metadata={"help": "When to freeze: see docs/policies.md."})
    freeze_points: str | None = field(
        default=None,
        metadata={
            "help": "For policy manual, `epoch:cut` pairs, e.g. '1:4,3:8': cut 4 from epoch 1 and cut 8 from epoch 3. "
            "A number with a point is a fraction of training ('0.25:8'), rounded up to an epoch."
        },
    )
    freeze_start: float = field(
        default=0.25, metadata={"help": "For policies linear and freezeout: fraction of training at the first freeze."}
    )
    freeze_end: float = field(
        default=0.5, metadata={"help": "For policies linear and auto: fraction of training at the last stage."}
    )
    max_frozen: float | None = field(
        default=None,
        metadata={
            "help": "For all policies but manual: fraction of the blocks frozen in the end, at most. If not given: "
            f"{MAX_FROZEN}; 1 for the policies that look which blocks have settled ({', '.join(LOOKING)})."
        },
    )
    freeze_stages: int = field(
        default=2,
        metadata={"help": "For policy linear: number of steps. Each costs a build: few, deep steps pay best."},
    )
    predictor: str | None = field(
        default=None,
        metadata={
            "help": "For policy smartfrz: folder or id on the Hub of a predictor of what has settled; if not "
            "given, the one that comes with the package."
        },
    )
    head_start_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Epochs for which the head alone is trained before the training begins, on features of the whole "
            "model before it, which runs once for them. Steps, schedule, epochs and logs of the training stay as they "
            f"are. 0: none. If not given: {HEAD_START_EPOCHS}, but none for the policies manual and none."
        },
    )
    head_start: HeadStartMode = field(
        default="new",
        metadata={
            "help": "What gets a head start: new is a head whose weights are those of an initialization, before a "
            "model whose weights are not; always is whatever comes behind the last block."
        },
    )
    head_start_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the head start; if not given, it is chosen on held-out training rows."},
    )
    anneal: AnnealMode = field(
        default="none",
        metadata={
            "help": "cosine lets the learning rate of a block fall to 0 until it freezes, as half a cosine over the "
            "optimizer steps; all else keeps its own. none: learning rates stay what the schedule says."
        },
    )
    anneal_scale: bool = field(
        default=False,
        metadata={
            "help": "Divide an annealed learning rate by the share of the training after which the block freezes, so "
            "that its sum over a training of constant learning rate does not depend on when that is (FreezeOut)."
        },
    )
    anneal_epochs: int = field(
        default=0,
        metadata={
            "help": "For policies that decide as the training goes: epochs from a decision to its freeze, in which "
            "the learning rates fall."
        },
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Multiply the learning rate of the last block by this number, that of the block before it by its "
            "square, and so on; the head keeps its own. 1.0: off."
        },
    )
    layer_decay_min: float = field(
        default=0.0,
        metadata={"help": "Freeze the blocks that layer_decay gives a smaller factor than this from the start."},
    )
    blocks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Module names of the blocks, stem first; if not given, they are found in a run of the model."
        },
    )
    cache: CacheMode = field(
        default="auto",
        metadata={
            "help": "auto builds a store if it saves more time in the remaining epochs than its build takes and if it "
            "fits the budget and the free disk; always builds whenever the budget allows it; never only freezes."
        },
    )
    feature_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": f"Folder of the stores; `output_dir/{CACHE_FOLDER}` if not given. A URL of fsspec, such as "
            "'s3://bucket/prefix', is read through a local copy, and stores that are built are uploaded there."
        },
    )
    cache_scope: CacheScope = field(
        default="shared",
        metadata={
            "help": "shared: all processes see the folder of the stores. node: it is on a disk of each machine, which "
            "stores, and samples in replay epochs, its own share of the rows; see docs/multi-process.md."
        },
    )
    reuse: ReuseMode = field(
        default="proved",
        metadata={
            "help": "Whether stores of earlier runs are used: proved computes rows all over a store again, compares "
            "them, and compares size and time of every file that a row is read from; content reads and compares the "
            "files; never uses no store but those of this training, also when it is resumed."
        },
    )
    share_store: bool = field(
        default=False,
        metadata={
            "help": "Where the train data set is a selection of rows (`select`, `filter`, `shuffle`, torch's Subset, "
            "also a contiguous range), the store of blocks frozen from the start holds all rows of its table and is "
            "kept, so that trainings on other selections, such as the folds of a cross-validation, read it instead of "
            "building their own."
        },
    )
    report: ReportMode = field(
        default="json",
        metadata={
            "help": "At the end of a training: json writes freeze_cache_report.json to output_dir, html a picture and "
            "a page as well, which need matplotlib; both log a table, and freeze/... beside the loss. none: nothing."
        },
    )
    codec: str = field(
        default="int4", metadata={"help": f"Encoding of the stored features: one of {', '.join(CODEC_NAMES)}."}
    )
    lossless: bool = field(
        default=False,
        metadata={
            "help": "Compress the codes of every row with zstd: smaller files, slightly slower reads. It saves most "
            "with int4 and on convolution maps. Until a store is built, a budget counts the uncompressed bytes."
        },
    )
    progressive: str | None = field(
        default=None,
        metadata={
            "help": "Codec by depth of the cut, in place of codec: `fraction of the blocks:codec` pairs, e.g. "
            "'0.25:int8,0.5:int4,0.75:int3'; below the first depth the first codec is used. 'default' is "
            "'0.0:int4,0.7:int3', measured on one model only (DeiT-Tiny)."
        },
    )
    cache_budget: str | None = field(
        default=None,
        metadata={
            "help": "Maximum size of all stores of a training at any moment, e.g. '20GB'. If the chosen codec does "
            "not fit, the next coarser one that fits is used."
        },
    )
    materialize: MaterializeMode = field(
        default="upfront",
        metadata={
            "help": "upfront builds a store in a pass of its own at the freeze; write_through trains the next epochs "
            "on samples and stores the features that they compute."
        },
    )
    deepen: DeepenMode = field(
        default="raw",
        metadata={
            "help": "Source of the store of a deeper cut: raw runs the whole prefix on samples, cache runs only the "
            "newly frozen blocks on the store of the previous cut."
        },
    )
    on_mismatch: MismatchMode = field(
        default="fallback",
        metadata={
            "help": "Where features turn out, in the course of a training, not to be those of the samples any more: "
            "fallback goes on from samples with a warning, error stops the training."
        },
    )
    cache_eval: bool = field(
        default=False,
        metadata={
            "help": "Also cache the evaluation set's features, in fp16, for the evaluations during training. The last "
            "evaluation runs on samples, and both results are logged."
        },
    )
    views: int = field(
        default=1,
        metadata={
            "help": "Number of augmented views stored beside the base view. A deterministic transform gets none; 0 "
            "ends augmentation at the freeze."
        },
    )
    sensitive_fraction: float = field(
        default=0.25,
        metadata={
            "help": "Fraction of the channels that is stored for every view: the channels that follow the "
            "augmentation least. The other channels are stored once and warped. 1.0 stores whole views."
        },
    )
    sensitive_budget: str | None = field(
        default=None,
        metadata={
            "help": "Size of the sensitive channels of all views, e.g. '2GB'; it sets their number in place of "
            "sensitive_fraction."
        },
    )
    similarity: Similarity = field(
        default="ssim",
        metadata={"help": f"How a channel is compared with its warped base view: {' or '.join(SIMILARITIES)}."},
    )
    sensitivity_batches: int = field(
        default=32, metadata={"help": "Maximum number of batches used to compare channels and to fit channel maps."}
    )
    channel_map: bool = field(
        default=True,
        metadata={
            "help": "Predict the channels that are not stored for a view by a linear map from all warped channels and "
            "the stored ones (one map for mirrored views, one for others); else each channel is only warped."
        },
    )
    push_head_only: bool = field(
        default=False,
        metadata={
            "help": "Push the head alone to the Hub, where Trainer pushes the whole model: what comes behind the cut, "
            "and blocks before it that differ from the base. load_head puts it on the base again. hub_strategy is "
            "every_save or end then, as the others push whole checkpoints."
        },
    )
    offload_frozen: bool = field(
        default=True,
        metadata={
            "help": "Keep the weights of the frozen blocks in the host's memory while steps run on features, on "
            "accelerators that can read it (CUDA, ROCm)."
        },
    )
    feature_noise: float = field(
        default=0.0, metadata={"help": "Standard deviation of Gaussian noise on replayed features."}
    )
    mixup_alpha: float = field(
        default=0.0,
        metadata={
            "help": "Alpha of mixup, which mixes images in live epochs and features in replay epochs; 0 turns it off."
        },
    )
    cutmix_alpha: float = field(
        default=0.0,
        metadata={
            "help": "Alpha of CutMix, which mixes images in live epochs and features in replay epochs; 0 turns it off."
        },
    )

    def __post_init__(self):
        if self.max_frozen is None:
            self.max_frozen = self._own_max_frozen
        if self.freeze_points is not None:
            self.freeze_points = format_freeze_points(self.freeze_points)
        _one_of("policy", self.policy, PolicyName)
        _one_of("cache", self.cache, CacheMode)
        check_codec_name(self.codec)
        codecs = [self.codec]
        if self.progressive is not None:
            codecs = [codec for _, codec in Progression.parse(self.progressive).steps]
        for codec in codecs:
            make_codec(codec, _ANY_LAYOUT)  # one that is not installed is found out now
        if self.materialize == "write_through" and self.deepen == "cache":
            raise ValueError(
                "deepen='cache' builds a deeper store from the one before; materialize='write_through' writes it in "
                "training epochs: choose one of them."
            )
        _one_of("similarity", self.similarity, Similarity)
        _one_of("materialize", self.materialize, MaterializeMode)
        _one_of("deepen", self.deepen, DeepenMode)
        _one_of("on_mismatch", self.on_mismatch, MismatchMode)
        _one_of("reuse", self.reuse, ReuseMode)
        _one_of("report", self.report, ReportMode)
        self._check_place()
        for name in ("freeze_start", "freeze_end", "max_frozen", "sensitive_fraction"):
            if not _is_number(getattr(self, name)) or not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r} is a fraction: from 0 to 1.")
        if self.freeze_start > self.freeze_end and self.policy != "freezeout":
            raise ValueError(
                f"freeze_start={self.freeze_start} is after freeze_end={self.freeze_end}: stages go from the first to "
                "the second."
            )
        if not isinstance(self.freeze_stages, int) or self.freeze_stages < 1:
            raise ValueError(
                f"freeze_stages={self.freeze_stages!r} must be an integer, at least 1; policy='none' freezes nothing."
            )
        self._check_augmentation()
        self._check_head_start()
        self._check_learning_rates()
        if self.policy == "manual":
            if self.freeze_points is None:
                raise ValueError("policy='manual' needs freeze_points, e.g. freeze_points='1:4,3:8'.")
            ManualPolicy(self.freeze_points)  # it checks them
        for name, policy in (("freeze_points", "manual"), ("predictor", "smartfrz")):
            if getattr(self, name) is not None and self.policy != policy:
                raise ValueError(f"{name} is read by policy='{policy}' only, not by policy='{self.policy}'.")

    def codec_at(self, cut: int, num_blocks: int) -> str:
        """The codec wanted at a cut.

        Args:
            cut: frozen blocks.
            num_blocks: `len(chain)`.
        """
        if self.progressive is None:
            return self.codec
        return Progression.parse(self.progressive).codec_at(cut, num_blocks)

    def changed(self, hidden: Collection[str] = ()) -> dict[str, str]:
        """The settings that are not the defaults, by name, as code writes them.

        Args:
            hidden: names that are left out.
        """
        given = {entry.name: (getattr(self, entry.name), entry.default) for entry in fields(self)}
        given["max_frozen"] = self.max_frozen, self._own_max_frozen
        return {name: repr(own) for name, (own, default) in given.items() if name not in hidden and own != default}

    def with_policy(self, policy: PolicyName) -> FreezeCacheConfig:
        """The same settings with another policy: what only the one before reads, or has by default, is left out."""
        deepest = None if self.max_frozen == self._own_max_frozen else self.max_frozen
        points = self.freeze_points if policy == "manual" else None
        return replace(self, policy=policy, freeze_points=points, max_frozen=deepest)

    @property
    def _own_max_frozen(self) -> float:
        return 1.0 if self.policy in LOOKING else MAX_FROZEN

    @property
    def epochs_of_head_start(self) -> int:
        """`head_start_epochs`; where it is not given, rules that choose by themselves what freezes have a head start.

        `manual` freezes what the user says, and nothing else is changed then.
        """
        if self.head_start_epochs is not None:
            return self.head_start_epochs
        return 0 if self.policy in ("manual", "none") else HEAD_START_EPOCHS

    @property
    def changes_learning_rates(self) -> bool:
        """Whether blocks get learning rates of their own."""
        return self.anneal != "none" or self.layer_decay != 1.0

    def cut_at_start(self, num_blocks: int) -> int:
        """Number of blocks that `layer_decay_min` freezes from the start.

        Args:
            num_blocks: `len(chain)`.
        """
        factors = [layer_factor(self.layer_decay, index, num_blocks) for index in range(num_blocks)]
        return sum(factor < self.layer_decay_min for factor in factors)

    def _check_learning_rates(self) -> None:
        _one_of("anneal", self.anneal, AnnealMode)
        epochs = self.anneal_epochs
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise ValueError(f"anneal_epochs={epochs!r} is a number of epochs: 0, 1, 2, ...")
        if self.anneal == "none" and (epochs or self.anneal_scale):
            raise ValueError("anneal_epochs and anneal_scale are read with anneal='cosine' only: set that too.")
        if not _is_number(self.layer_decay) or not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(
                f"layer_decay={self.layer_decay!r} is a factor from one block to the one before it: more than 0, at "
                "most 1.0 (off)."
            )
        if not _is_number(self.layer_decay_min) or not 0.0 <= self.layer_decay_min < 1.0:
            raise ValueError(f"layer_decay_min={self.layer_decay_min!r} is a factor: from 0 (off) to less than 1.")
        if self.layer_decay_min and self.layer_decay == 1.0:
            raise ValueError(
                "layer_decay_min freezes blocks to which layer_decay gives a smaller factor: set layer_decay below 1."
            )

    def _check_place(self) -> None:
        _one_of("cache_scope", self.cache_scope, CacheScope)
        if self.feature_cache_dir is not None and is_url(self.feature_cache_dir):
            check_url(self.feature_cache_dir)
        if self.cache_scope == "shared":
            return
        for name, (value, why) in _NOT_OF_NODES.items():
            if getattr(self, name) == value:
                raise ValueError(
                    f"{name}={value!r} does not go with cache_scope='node': {why}. Use another setting, or a folder "
                    "that all machines see."
                )

    def _check_head_start(self) -> None:
        _one_of("head_start", self.head_start, HeadStartMode)
        epochs, rate = self.head_start_epochs, self.head_start_lr
        if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0):
            raise ValueError(f"head_start_epochs={epochs!r} is a number of epochs: 0, 1, 2, ..., or None.")
        if rate is not None and (not _is_number(rate) or not 0.0 < rate < float("inf")):
            raise ValueError(f"head_start_lr={rate!r} must be more than 0, and finite; None chooses one.")

    def _check_augmentation(self) -> None:
        if isinstance(self.views, bool) or not isinstance(self.views, int) or self.views < 0:
            raise ValueError(f"views={self.views!r} is a number of views: 0, 1, 2, ...")
        if not isinstance(self.sensitivity_batches, int) or self.sensitivity_batches < 1:
            raise ValueError(f"sensitivity_batches={self.sensitivity_batches!r} must be at least 1.")
        for name in ("feature_noise", "mixup_alpha", "cutmix_alpha"):
            if not _is_number(getattr(self, name)) or not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r} must be 0 (off) or more, and finite.")
        for name in ("sensitive_budget", "cache_budget"):
            size = getattr(self, name)
            try:
                if size is not None:
                    parse_bytes(size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(name: str, value: str, choice: Any) -> None:
    allowed = get_args(choice)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; possible are {', '.join(allowed)}.")
