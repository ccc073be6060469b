"""Whose code something is: that of an installed package, which its version describes, or the user's own."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..distributed import Announcer

logger = logging.get_logger(__name__)

#: This package counts as installed wherever it lies.
_OWN = __name__.split(".")[0]
#: Folders into which packages are installed, of whichever Python or user they are.
_PACKAGE_FOLDERS = {"site-packages", "dist-packages"}
#: Flag of classes that were made at run time (`Py_TPFLAGS_HEAPTYPE`).
_HEAP_TYPE = 1 << 9


def is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package.

    Args:
        module: its full name; None where nothing says it, which is the case for what C code defines.
    """
    return module is None or _is_installed(_top(module))


def is_installed_class(cls: type) -> bool:
    """Whether a class belongs to Python or to an installed package."""
    if cls.__module__ == "builtins":
        # A class statement in code that was run without a module's name says this too.
        return not cls.__flags__ & _HEAP_TYPE
    return is_installed(cls.__module__)


def describe_origin(module: str | None) -> str:
    """Package and version of a module, e.g. `torch 2.9.0`."""
    return "python" if module is None else f"{_top(module)} {_version(_top(module))}"


def package_of(module: str | None) -> str:
    """Name of the package that a module belongs to."""
    return "builtins" if module is None else _top(module)


def global_name_of(function: Any) -> str | None:
    """The module in which a function's code was written, whatever a decorator calls it; None: not Python code."""
    namespace = getattr(function, "__globals__", None)
    return None if namespace is None else namespace.get("__name__", "__main__")


def _top(module: str) -> str:
    return module.split(".")[0]


@functools.cache
def _is_installed(top: str) -> bool:
    if top == "__main__":  # a script or a notebook, whatever has started it
        return False
    if top in sys.builtin_module_names or top in sys.stdlib_module_names or top == _OWN:
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        paths = list(getattr(sys.modules.get(top), "__path__", []))
        file = paths[0] if paths else None
    if file is None:
        return False
    path = Path(file).resolve()
    is_beside_others = not _PACKAGE_FOLDERS.isdisjoint(path.parts)
    is_of_python = any(path.is_relative_to(folder) for folder in _folders_of_python())
    return is_beside_others or is_of_python or _is_recorded(top, path)


def _is_recorded(top: str, path: Path) -> bool:
    """Whether an installer has noted that it put a module where it lies (`pip install --target`).

    One that is installed for editing (`pip install --editable`) lies elsewhere, and is the user's own code; so is one
    beside a record that cannot be read, which costs more work and loses nothing.
    """
    folder = next((parent.parent for parent in path.parents if parent.name == top), path.parent)
    for record in folder.glob("*.dist-info/RECORD"):
        try:
            with record.open(encoding="utf-8", errors="replace") as lines:
                if any(line.startswith((f"{top}/", f"{top}.py,")) for line in lines):
                    return True
        except OSError as error:
            Announcer.survived(logger, f"{record}, the record of an installed package, cannot be read", error)
    return False


@functools.cache
def _folders_of_python() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths[name]).resolve() for name in ("purelib", "platlib", "stdlib", "platstdlib")]


@functools.cache
def _version(top: str) -> str:
    if top in sys.builtin_module_names or top in sys.stdlib_module_names:
        return ".".join(platform.python_version_tuple()[:2])
    version = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(version, str):
        return version
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
