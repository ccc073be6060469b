"""Following an image through a function: the coordinate grid goes through every call of torchvision that it does.

While a function runs, calls of `torchvision.transforms.functional` and of the kernels of `v2.functional` are watched,
and a few of PIL's and torchvision's conversions. A call does what it does unwatched. What it returns carries the grid
of the image that went in, moved by the same call. What other code returns carries none.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2
from torchvision.transforms.v2.functional._utils import _KERNEL_REGISTRY, _get_kernel
from transformers.utils import logging

from .coordinate_grid import CoordinateGrid, GridRefusedError

logger = logging.get_logger(__name__)

# Kinds of images, whose kernels are watched; those of masks move grids.
_IMAGES = (torch.Tensor, PIL.Image.Image, tv_tensors.Image)
# What v2 does not look up as kernels.
_CONVERSIONS = ("to_image", "to_pil_image", "pil_to_tensor", "to_tensor", "convert_image_dtype")
# Methods of PIL images that leave every pixel where it is.
_PIL_METHODS = ("convert", "copy")
# `to_dtype` has a kernel for masks too, but changes no geometry.
_UNMOVED = (v2.to_dtype,)
_UNKNOWN = (
    "an image that no followed call has returned (NumPy, albumentations, kornia, cv2, PIL's own crops and the like "
    "cannot be followed)"
)

_current: ContextVar[Followed | None] = ContextVar("freezecache_followed", default=None)


class Followed:
    """The grids of the images in one run of a function.

    Args:
        image: the image that the function gets.
        grid: its coordinate grid.
    """

    def __init__(self, image: Any, grid: CoordinateGrid):
        # The images are kept: the address of one that is gone may be another's.
        self._known: dict[tuple, tuple[Any, CoordinateGrid | str]] = {_identity(image): (image, grid)}
        self._running = False
        self._last: str | None = None

    def grid_of(self, pixels: Any) -> CoordinateGrid:
        """The grid of what the function has made of the image.

        Args:
            pixels: tensor `(C, H, W)` that a followed call has returned, or equal to one.

        Raises:
            GridRefusedError: if no call has; the message says what could not be followed.

        Shapes: C channels, H x W pixels.
        """
        known = self._find(pixels)
        if known is None and isinstance(pixels, (torch.Tensor, np.ndarray)):
            known = self._find_equal(torch.as_tensor(pixels))
        if isinstance(known, CoordinateGrid):
            return known
        after = f" after `{self._last}`" if self._last is not None else ""
        raise GridRefusedError(known or f"its pixels are {_UNKNOWN}{after}")

    def call(self, name: str, image: Any, run: Callable[[], Any], move: Callable[[CoordinateGrid], Any]) -> Any:
        """Runs a watched call and keeps the grid of what it returns.

        Args:
            name: of the call.
            image: what goes in.
            run: the call.
            move: does to a grid what the call does to an image.
        """
        if self._running:  # one call inside another: the outer one moves the grid
            return run()
        known = self._find(image)
        self._running = True
        try:
            result = run()
            moved = self._move(name, known, move)
        finally:
            self._running = False
        if isinstance(result, (*_IMAGES, np.ndarray)):
            self._keep(name, result, moved)
        return result

    def _move(self, name: str, known: CoordinateGrid | str | None, move: Callable) -> CoordinateGrid | str:
        if known is None:
            after = f" after `{self._last}`" if self._last is not None else ""
            return f"`{name}` gets {_UNKNOWN}{after}"
        if isinstance(known, str):
            return known
        try:
            return move(known)
        except Exception as error:  # the image alone caused no error, so the grid did
            logger.debug("`%s` does not take a mask", name, exc_info=error)
            return f"`{name}` does not take a mask: {type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _keep(self, name: str, result: Any, moved: CoordinateGrid | str) -> None:
        if isinstance(moved, CoordinateGrid):
            self._last = name
            size = _size(result)
            if size != tuple(moved.shape[1:]):
                moved = f"`{name}` gives an image another size than a mask: {size}, not {tuple(moved.shape[1:])}"
        self._known[_identity(result)] = result, moved

    def _find(self, value: Any) -> CoordinateGrid | str | None:
        return self._known.get(_identity(value), (None, None))[1]

    def _find_equal(self, pixels: torch.Tensor) -> CoordinateGrid | str | None:
        for value, known in reversed(self._known.values()):
            if isinstance(value, torch.Tensor) and value.dtype == pixels.dtype and value.shape == pixels.shape:
                if torch.equal(value.as_subclass(torch.Tensor), pixels.as_subclass(torch.Tensor)):
                    return known
        return None


@contextlib.contextmanager
def follow(image: Any, grid: CoordinateGrid) -> Iterator[Followed]:
    """Inside the context, this thread's calls of torchvision are watched. Nothing is drawn, and no result changes.

    Args:
        image: PIL image, tensor `(C, H, W)` or array `(H, W)` or `(H, W, C)`.
        grid: its coordinate grid.

    Shapes: C channels, H x W pixels.
    """
    followed = Followed(image, grid)
    _patches.add()
    token = _current.set(followed)
    try:
        yield followed
    finally:
        _current.reset(token)
        _patches.drop()


def _identity(value: Any) -> tuple:
    """What two names of the same pixels share: a tensor and a view of all of it, as another class, are the same."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided:
        return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
    return (id(value),)


def _size(image: Any) -> tuple[int, ...]:
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    return tuple(image.shape[:2]) if isinstance(image, np.ndarray) else tuple(image.shape[-2:])


class _Patches:
    """The watched calls, while some thread of this process follows a function."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._undo: list[Callable[[], None]] = []

    def add(self) -> None:
        """Watches from now on, if nobody did."""
        with self._lock:
            if not self._users:
                try:
                    self._watch()
                except BaseException:
                    self._restore()
                    raise
            self._users += 1

    def drop(self) -> None:
        """Stops watching if nobody else needs it."""
        with self._lock:
            if not self._users:  # a process that was forked while a function ran
                return
            self._users -= 1
            if not self._users:
                self._restore()

    def reset(self) -> None:
        """In a forked process, whose only thread may have been following nothing."""
        self._lock, self._users = threading.Lock(), 0
        self._restore()

    def _watch(self) -> None:
        for name, function in list(vars(v1).items()):
            if _is_of_images(function):
                self._set(v1, name, _watch_function(function, getattr(v2, name, None)))
        for name in _CONVERSIONS:
            self._set(v2, name, _watch_function(getattr(v2, name), None))
        for functional, kernels in _KERNEL_REGISTRY.items():
            if not functional.__name__.startswith("get_"):
                for kind in _IMAGES:
                    if kind in kernels:
                        self._set(kernels, kind, _watch_kernel(functional, kernels[kind]))
        for name in _PIL_METHODS:
            self._set(PIL.Image.Image, name, _watch_function(getattr(PIL.Image.Image, name), None))

    def _set(self, owner: Any, name: Any, watched: Callable) -> None:
        """Replaces an attribute of an object or an entry of a dictionary."""
        if isinstance(owner, dict):
            original = owner[name]
            owner[name] = watched
        else:
            original = vars(owner)[name]
            setattr(owner, name, watched)

        def undo() -> None:
            # What somebody else has put in its place meanwhile stays.
            if isinstance(owner, dict):
                if owner.get(name) is watched:
                    owner[name] = original
            elif vars(owner).get(name) is watched:
                setattr(owner, name, original)

        self._undo.append(undo)

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()


_patches = _Patches()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_patches.reset)


def _is_of_images(function: Any) -> bool:
    """Whether a member of torchvision's first functional module takes an image and may return one."""
    if not inspect.isfunction(function) or function.__module__ != v1.__name__:
        return False
    return not function.__name__.startswith(("_", "get_"))


@functools.cache
def _watch_function(function: Callable, functional: Callable | None) -> Callable:
    """A function that takes an image as its first parameter, watched.

    Args:
        function: the function.
        functional: of v2 and with the same parameters, which moves the grid; None: the grid stays.
    """
    first, *others = inspect.signature(function).parameters

    @functools.wraps(function)
    def watched(*args: Any, **settings: Any) -> Any:
        followed = _current.get()
        if followed is None or not (args or first in settings):
            return function(*args, **settings)

        def move(grid: CoordinateGrid) -> Any:
            named = {**dict(zip(others, args[1:], strict=False)), **settings}
            named.pop(first, None)
            return _move_grid(functional, grid, named) if functional is not None else grid

        image = args[0] if args else settings[first]
        return followed.call(function.__name__, image, lambda: function(*args, **settings), move)

    return watched


@functools.cache
def _watch_kernel(functional: Callable, kernel: Callable) -> Callable:
    """A kernel for images, watched; the functional's kernel for grids moves the grid."""

    @functools.wraps(kernel)
    def watched(image: Any, *args: Any, **settings: Any) -> Any:
        followed = _current.get()
        if followed is None:
            return kernel(image, *args, **settings)
        return followed.call(
            functional.__name__,
            image,
            lambda: kernel(image, *args, **settings),
            lambda grid: _call_kernel(functional, grid, *args, **settings),
        )

    return watched


def _move_grid(functional: Callable, grid: CoordinateGrid, settings: dict[str, Any]) -> CoordinateGrid:
    """Calls a functional for a grid by the names of its parameters; one that has no kernel for masks leaves it."""
    return functional(grid, **settings) if _moves(functional) else grid


def _call_kernel(functional: Callable, grid: CoordinateGrid, *args: Any, **settings: Any) -> CoordinateGrid:
    if functional in _UNMOVED:
        return grid
    return _get_kernel(functional, CoordinateGrid, allow_passthrough=True)(grid, *args, **settings)


def _moves(functional: Callable) -> bool:
    kernels = _KERNEL_REGISTRY.get(_ALIASES.get(functional, functional), {})
    return any(kind in kernels for kind in (CoordinateGrid, tv_tensors.Mask))


#: Functionals of v2 that call another one.
_ALIASES: dict[Callable, Callable] = {v2.elastic_transform: v2.elastic}
