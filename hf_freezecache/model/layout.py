"""Shape and meaning of one sample's feature."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Fields that manifests hold where they are true.
_FLAGS = ("is_token", "is_trimmed")


@dataclass(frozen=True)
class FeatureLayout:
    """Shape and meaning of one sample's feature.

    Args:
        shape: without the batch: `(T, C)` tokens, a `(C, H, W)` feature map or a `(C,)` vector.
        grid: `(H, W)` of the spatial positions; None where the feature has none (text, vectors).
        special_tokens: number of leading tokens that are no positions of an image (CLS, distillation, registers); 0
            for feature maps and vectors.
        dtype: float32, float16 or bfloat16.
        is_token: whether this is the layout `(C,)` of a token of a text, of which a sample has as many as it has; or
            of a position of a sample that has a size of its own.
        is_trimmed: whether this is the layout of the widest batches, of which narrower ones take a part.

    Raises:
        ValueError: if the fields contradict each other.

    Shapes: T tokens (special ones included), C channels, H height, W width.
    """

    shape: tuple[int, ...]
    grid: tuple[int, int] | None
    special_tokens: int
    dtype: torch.dtype
    is_token: bool = False
    is_trimmed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise ValueError(f"a feature is (C,), (T, C) or (C, H, W) with positive sizes, got shape {self.shape}")
        if self.dtype not in _DTYPES.values():
            raise ValueError(f"a feature is one of {', '.join(_DTYPES)}, got {self.dtype}")
        most = self.shape[0] - 1 if len(self.shape) == 2 else 0
        if not 0 <= self.special_tokens <= most:
            raise ValueError(
                f"shape {self.shape} can have 0 to {most} leading special tokens, "
                f"got special_tokens={self.special_tokens}"
            )
        if self.grid is not None and prod(self.grid) != self.positions:
            raise ValueError(f"grid {self.grid} does not cover the {self.positions} positions of shape {self.shape}")
        if self.is_token and len(self.shape) != 1:
            raise ValueError(f"the feature of a token is (C,), got shape {self.shape}")
        if self.is_token and self.is_trimmed:
            raise ValueError("the feature of a token has no width to trim")

    @property
    def channel_dim(self) -> int:
        """Index of the channels in `shape`: first for a feature map, last for tokens and vectors."""
        return 0 if len(self.shape) == 3 else len(self.shape) - 1

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return self.shape[self.channel_dim]

    @property
    def values(self) -> int:
        """Number of values of one feature, special tokens included."""
        return prod(self.shape)

    @property
    def positions(self) -> int:
        """Number of values of one channel, special tokens excluded."""
        return self.values // self.channels - self.special_tokens

    def body(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(B, *shape)` without their special tokens; shares their memory."""
        return features[:, self.special_tokens :] if self.special_tokens else features

    def narrowed(self, channels: int) -> "FeatureLayout":
        """The layout of fewer channels, without special tokens.

        Args:
            channels: number of channels.
        """
        if len(self.shape) == 3:
            shape = (channels, *self.shape[1:])
        else:
            shape = (*((self.positions,) if len(self.shape) == 2 else ()), channels)
        return FeatureLayout(shape, self.grid, 0, self.dtype)

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON values, for a manifest."""
        layout = {
            "shape": list(self.shape),
            "grid": None if self.grid is None else list(self.grid),
            "special_tokens": self.special_tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        return layout | {name: True for name in _FLAGS if getattr(self, name)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "FeatureLayout":
        """The layout that `to_json` has written.

        Raises:
            ValueError: if the dtype is unknown or the fields contradict each other.
        """
        if data["dtype"] not in _DTYPES:
            raise ValueError(f"a feature is one of {', '.join(_DTYPES)}, got {data['dtype']!r}")
        return cls(
            shape=tuple(data["shape"]),
            grid=None if data["grid"] is None else tuple(data["grid"]),
            special_tokens=data["special_tokens"],
            dtype=_DTYPES[data["dtype"]],
            **{name: data[name] for name in _FLAGS if name in data},
        )


def to_positions(features: torch.Tensor) -> torch.Tensor:
    """Features as vectors of channels, one for each position; a feature that is one vector has one position.

    Args:
        features: `(B, T, C)`, `(B, C, H, W)` or `(B, C)`.

    Returns:
        `(B, P, C)`.

    Shapes: B samples, T tokens, C channels, H x W positions of a map, P positions, T, H * W or 1.
    """
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features.unsqueeze(1) if features.ndim == 2 else features


def from_positions(vectors: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Features of a shape from what `to_positions` gives.

    Args:
        vectors: `(B, P, C)`.
        shape: of a sample's feature.

    Returns:
        `(B, *shape)`.

    Shapes: B samples, P positions, C channels.
    """
    ordered = vectors.transpose(1, 2) if len(shape) == 3 else vectors
    return ordered.reshape(len(vectors), *shape)


def token_grid(
    tokens: int, aspect: float, expected: tuple[int, int] | None = None, most_special: int = 16
) -> tuple[tuple[int, int] | None, int]:
    """Splits a number of tokens into special tokens and a grid with the image's aspect ratio (height / width).

    Args:
        tokens: number of all tokens.
        aspect: height of the image divided by its width.
        expected: grid that the configuration of the model gives; None if it gives none.
        most_special: largest number of special tokens that is tried.

    Returns:
        `((height, width), special tokens)`: the expected grid if the number of tokens allows it, otherwise the grid
        with the fewest special tokens; `(None, 0)` if no grid fits.
    """
    if expected is not None and 0 <= tokens - expected[0] * expected[1] <= most_special:
        return expected, tokens - expected[0] * expected[1]
    for special in range(min(most_special, tokens - 1) + 1):
        patches = tokens - special
        height, width = round((patches * aspect) ** 0.5), round((patches / aspect) ** 0.5)
        if height * width == patches:
            return (height, width), special
    return None, 0
