"""Digests of code: functions by what they do and refer to, classes by their methods, wherever they were written.

Code of the user counts by its bytecode, constants, defaults and closure, and by the globals that it names, which are
followed. So a class of a notebook cell counts as one of a file does, and an edited helper, constant or base class
counts too. Code of an installed package counts by its name and the version of the package.
"""

from __future__ import annotations

import dis
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .installed import describe_origin, global_name_of, is_installed, is_installed_class, package_of

#: Turns what code refers to into a digest.
Digest = Callable[[Any], bytes]

#: Attributes of a class that say nothing of what it does.
_NO_CODE = {
    "__abstractmethods__",
    "__annotate__",
    "__annotations__",
    "__annotations_cache__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__qualname__",
    "__static_attributes__",
    "__weakref__",
    "_abc_impl",
}


def function_parts(function: FunctionType) -> Iterator[Any]:
    """What a Python function consists of, as values to digest."""
    module = global_name_of(function)
    yield from code_parts(function.__code__)
    yield function.__defaults__
    yield function.__kwdefaults__
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled in yet
            yield "empty"
    yield {name: value for name, value in vars(function).items() if name != "__wrapped__"}
    if is_installed(module):
        yield f"{module} of {describe_origin(module)}"
        return
    yield from _globals(function.__code__, function.__globals__)


def code_parts(code: CodeType) -> Iterator[Any]:
    """What compiled code does, without the place where it was written."""
    yield from (code.co_code, code.co_names, code.co_freevars, code.co_cellvars, code.co_flags)
    yield from (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    for constant in code.co_consts:
        yield list(code_parts(constant)) if isinstance(constant, CodeType) else constant


def class_parts(cls: type, digest: Digest) -> Iterator[Any]:
    """What a class and its bases consist of, as values to digest.

    Args:
        cls: the class.
        digest: of one attribute.
    """
    for base in cls.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if is_installed_class(base):
            yield f"{name} of {describe_origin(base.__module__)}"
            yield from _foreign_methods(base)
            continue
        yield base.__qualname__
        for attribute in sorted(vars(base)):
            if attribute not in _NO_CODE:
                yield attribute
                yield digest(vars(base)[attribute])


def _foreign_methods(cls: type) -> Iterator[Any]:
    """Methods that somebody else has put into a class of an installed package."""
    for name, value in sorted(vars(cls).items()):
        if not isinstance(value, FunctionType):
            continue
        module = global_name_of(value)
        if not is_installed(module):
            yield name
            yield value
        elif package_of(module) != package_of(cls.__module__):
            yield f"{name}: {module}.{value.__qualname__} of {describe_origin(module)}"


def _globals(code: CodeType, namespace: dict[str, Any]) -> Iterator[Any]:
    """The globals that code names, those of the functions in it included."""
    names, imported, attributes = _names_in(code)
    for name in sorted(names):
        if name in namespace:
            yield name
            yield from _referred(namespace[name], attributes)
    package = namespace.get("__package__") or ""
    for name, level in sorted(imported):
        full = importlib.util.resolve_name("." * level + name, package) if level and package else name
        if full in sys.modules:
            yield from _referred(sys.modules[full], attributes)


def _referred(value: Any, attributes: set[str]) -> Iterator[Any]:
    if not isinstance(value, ModuleType):
        yield value
    elif is_installed(value.__name__):
        yield describe_origin(value.__name__)
    else:
        for name in sorted(attributes & vars(value).keys()):
            yield name
            yield from _referred(vars(value)[name], attributes - {name})


def _names_in(code: CodeType) -> tuple[set[str], set[tuple[str, int]], set[str]]:
    """Names of globals, imported modules with their relative levels, and names of attributes."""
    names: set[str] = set()
    imported: set[tuple[str, int]] = set()
    attributes = set(code.co_names)
    instructions = list(dis.get_instructions(code))
    for place, instruction in enumerate(instructions):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            level = instructions[place - 2].argval if place >= 2 else 0
            imported.add((instruction.argval, level if isinstance(level, int) else 0))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_names, inner_imported, inner_attributes = _names_in(constant)
            names |= inner_names
            imported |= inner_imported
            attributes |= inner_attributes
    return names, imported, attributes
