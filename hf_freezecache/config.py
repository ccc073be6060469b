"""Every knob of the library, as one dataclass that works in `HfArgumentParser`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .augment.sensitivity import SIMILARITIES
from .cache.codec import CODEC_NAMES, check_codec_name, make_codec
from .cache.codec.progression import Progression
from .model.layout import FeatureLayout
from .policies.schedule import parse_freeze_points
from .units import parse_bytes

POLICY_NAMES = ("none", "manual", "linear")
CACHE_MODES = ("auto", "always", "never")
MATERIALIZE_MODES = ("upfront", "write_through")
DEEPEN_MODES = ("raw", "cache")
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

    policy: str = field(default="linear", metadata={"help": "When to freeze: none, manual or linear."})
    freeze_points: str | None = field(
        default=None,
        metadata={
            "help": "For policy manual, `epoch:cut` pairs, e.g. '1:4,3:8': cut 4 from epoch 1 and cut 8 from epoch 3. "
            "A number with a point is a fraction of training ('0.25:8'), rounded up to an epoch."
        },
    )
    freeze_start: float = field(default=0.25, metadata={"help": "For policy linear: fraction of training at stage 1."})
    freeze_end: float = field(
        default=0.5, metadata={"help": "For policy linear: fraction of training at the last stage."}
    )
    max_frozen: float = field(
        default=0.75, metadata={"help": "For policy linear: fraction of the blocks frozen in the end."}
    )
    freeze_stages: int = field(
        default=2, metadata={"help": "For policy linear: number of steps. Each one costs a build: few, deep steps."}
    )
    blocks: list[str] | None = field(
        default=None,
        metadata={"help": "Module names of the blocks, stem first, for models whose blocks are not declared."},
    )
    cache: str = field(
        default="auto",
        metadata={
            "help": "auto builds a store where it pays for the epochs that remain and the budget and the free disk "
            "hold it; always builds wherever the budget holds it; never only freezes."
        },
    )
    feature_cache_dir: str | None = field(
        default=None, metadata={"help": "Where stores lie; `output_dir/_freeze_cache` if not given."}
    )
    codec: str = field(
        default="int4", metadata={"help": f"How a feature becomes bytes: one of {', '.join(CODEC_NAMES)}."}
    )
    lossless: bool = field(
        default=False,
        metadata={
            "help": "Pack every row's codes with zstd: smaller files, a little more time to read; most with int4 and "
            "convolution maps. A budget counts the bytes of rows that do not pack, until a store is built."
        },
    )
    progressive: str | None = field(
        default=None,
        metadata={
            "help": "Codec by depth of the cut, in place of codec: `fraction of the blocks:codec` pairs, e.g. "
            "'0.25:int8,0.5:int4,0.75:int3'; below the first depth its codec holds. 'default' is a progression that "
            "was measured to be right for most models."
        },
    )
    cache_budget: str | None = field(
        default=None,
        metadata={
            "help": "Most bytes that the stores of a training may take at any moment, e.g. '20GB'. A coarser codec is "
            "taken where it fits and the wanted one does not."
        },
    )
    materialize: str = field(
        default="upfront",
        metadata={
            "help": "upfront builds a store in passes over the data at the freeze; write_through trains the first "
            "epochs after it live and stores what they compute."
        },
    )
    deepen: str = field(
        default="raw",
        metadata={
            "help": "Where a deeper store comes from: raw runs the prefix on images, cache runs the newly frozen "
            "blocks on the store of the cut before."
        },
    )
    cache_eval: bool = field(
        default=False,
        metadata={
            "help": "Keep the evaluation set's features in fp16 too, for the evaluations during training; the last "
            "one runs on images, and both results are logged."
        },
    )
    views: int = field(
        default=1,
        metadata={
            "help": "Augmented views stored beside the base view. A deterministic transform needs none and gets none; "
            "0 ends augmentation at the freeze point."
        },
    )
    sensitive_fraction: float = field(
        default=0.25,
        metadata={
            "help": "Fraction of the channels that is stored for every view: those that follow the augmentation "
            "least. The others are stored once and warped. 1.0 stores whole views."
        },
    )
    sensitive_budget: str | None = field(
        default=None,
        metadata={
            "help": "Bytes for the sensitive channels of all views, e.g. '2GB'; decides their number in place of "
            "sensitive_fraction."
        },
    )
    similarity: str = field(
        default="ssim",
        metadata={"help": f"How a channel is compared with its warped base view: {' or '.join(SIMILARITIES)}."},
    )
    sensitivity_batches: int = field(
        default=32, metadata={"help": "Batches, drawn from the seed, on which channels are compared at most."}
    )
    channel_map: bool = field(
        default=True,
        metadata={
            "help": "Make the channels that are not stored for a view from all warped ones and the stored ones, by a "
            "linear map (one for mirrored views, one for others); else each is its base view's, warped."
        },
    )
    feature_noise: float = field(
        default=0.0, metadata={"help": "Standard deviation of Gaussian noise on replayed features."}
    )
    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Mixup of images in live epochs and of features in replay epochs; 0 is none."},
    )
    cutmix_alpha: float = field(
        default=0.0,
        metadata={"help": "CutMix of images in live epochs and of features in replay epochs; 0 is none."},
    )

    def __post_init__(self):
        _one_of("policy", self.policy, POLICY_NAMES)
        _one_of("cache", self.cache, CACHE_MODES)
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
        _one_of("similarity", self.similarity, SIMILARITIES)
        _one_of("materialize", self.materialize, MATERIALIZE_MODES)
        _one_of("deepen", self.deepen, DEEPEN_MODES)
        for name in ("freeze_start", "freeze_end", "max_frozen", "sensitive_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r} is a fraction: from 0 to 1.")
        if self.freeze_start > self.freeze_end:
            raise ValueError(
                f"freeze_start={self.freeze_start} is after freeze_end={self.freeze_end}: stages go from the first to "
                "the second."
            )
        if self.freeze_stages < 1:
            raise ValueError(
                f"freeze_stages={self.freeze_stages!r} must be at least 1; policy='none' freezes nothing."
            )
        self._check_augmentation()
        if self.policy == "manual":
            if self.freeze_points is None:
                raise ValueError("policy='manual' needs freeze_points, e.g. freeze_points='1:4,3:8'.")
            parse_freeze_points(self.freeze_points)
        elif self.freeze_points is not None:
            raise ValueError(f"freeze_points is read by policy='manual' only, not by policy='{self.policy}'.")

    def codec_at(self, cut: int, num_blocks: int) -> str:
        """The codec wanted at a cut.

        Args:
            cut: frozen blocks.
            num_blocks: `len(chain)`.
        """
        if self.progressive is None:
            return self.codec
        return Progression.parse(self.progressive).codec_at(cut, num_blocks)

    def _check_augmentation(self) -> None:
        if isinstance(self.views, bool) or not isinstance(self.views, int) or self.views < 0:
            raise ValueError(f"views={self.views!r} is a number of views: 0, 1, 2, ...")
        if self.sensitivity_batches < 1:
            raise ValueError(f"sensitivity_batches={self.sensitivity_batches!r} must be at least 1.")
        for name in ("feature_noise", "mixup_alpha", "cutmix_alpha"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r} must be 0 (off) or more, and finite.")
        for name in ("sensitive_budget", "cache_budget"):
            size = getattr(self, name)
            try:
                if size is not None:
                    parse_bytes(size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; possible are {', '.join(allowed)}.")
