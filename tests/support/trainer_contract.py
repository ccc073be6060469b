"""What the package takes from `transformers.Trainer`: names, signatures, bodies and the order of calls."""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import Trainer, TrainerCallback

import hf_freezecache
from hf_freezecache import ZeroOrderTrainer

PACKAGE = Path(hf_freezecache.__file__).parent
RECORD = Path(__file__).parents[1] / "trainer_contract.json"
#: Attributes of a trainer whose own attributes are part of the contract.
HOLDERS = ("args", "state", "control", "accelerator", "callback_handler")


# What is used


@dataclass
class Uses:
    """Names of `Trainer` in the package's source.

    Args:
        overrides: methods that the package's trainer classes define anew.
        names: everything of a trainer that is read, called or overridden.
        chains: dotted names below a trainer's attribute, e.g. `args.n_gpu`.
    """

    overrides: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    chains: set[str] = field(default_factory=set)


def names_on(trainer_class: type) -> set[str]:
    """Methods, properties and attributes of a class, those that only a running training sets included."""
    names: set[str] = set()
    for cls in trainer_class.__mro__[:-1]:
        names |= set(vars(cls)) - set(vars(object)) - {"__module__", "__dict__", "__weakref__", "__annotations__"}
        names |= {
            node.attr
            for node in ast.walk(_parse(cls))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_name(node.value, "self")
        }
    return names | {"__init__"}


def uses_of_package() -> Uses:
    """Uses in the classes of the package that are trainers, and of variables called `trainer` everywhere."""
    known = names_on(Trainer)
    uses = Uses()
    for cls in ZeroOrderTrainer.__mro__:
        if cls.__module__.partition(".")[0] == PACKAGE.name:
            scan_class(_parse(cls), known, uses)
    for path in PACKAGE.rglob("*.py"):
        _scan_attributes(ast.parse(path.read_text()), known, uses, _is_trainer_variable)
    return uses


def scan_class(tree: ast.AST, known: Iterable[str], uses: Uses) -> None:
    """Adds what the class definitions in a tree override and use of a trainer."""
    known = set(known)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            defined = {item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}
            uses.overrides |= defined & known
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_"):
            uses.names |= {node.value} & known  # `self.__dict__.pop("_name")`
    uses.names |= uses.overrides
    _scan_attributes(tree, known, uses, _is_self)


def imports_of_package() -> set[str]:
    """`module.name` of what is imported from submodules of Transformers, which promise less than its top."""
    imports = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                imports |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in imports if not name.startswith("transformers.utils.")}


def _scan_attributes(tree: ast.AST, known: set[str], uses: Uses, is_trainer: Callable[[ast.AST], bool]) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if is_trainer(node.value) and node.attr in known:
            uses.names.add(node.attr)
        below = node.value
        if isinstance(below, ast.Attribute) and below.attr in HOLDERS and is_trainer(below.value):
            uses.chains.add(f"{below.attr}.{node.attr}")


def _is_self(node: ast.AST) -> bool:
    """`self`, `super()`, `type(self)` or `Trainer`."""
    if isinstance(node, ast.Call):
        return _is_name(node.func, "super") or (
            _is_name(node.func, "type") and bool(node.args) and _is_name(node.args[0], "self")
        )
    return _is_name(node, "self") or _is_name(node, "Trainer")


def _is_trainer_variable(node: ast.AST) -> bool:
    return _is_name(node, "trainer") or _is_name(node, "Trainer") or getattr(node, "attr", None) == "trainer"


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _parse(thing: Any) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


# What it is


def signature_of(thing: Any) -> str:
    """Names, kinds and defaults of the parameters; annotations may change."""
    empty = inspect.Parameter.empty
    parameters = inspect.signature(thing).parameters.values()
    return f"({', '.join(str(parameter.replace(annotation=empty)) for parameter in parameters)})"


def code_of(thing: Any) -> str:
    """The source without docstrings, comments and blank lines: text, as every Python version would give it."""
    source = textwrap.dedent(inspect.getsource(thing))
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node) is not None
        ):
            string = node.body[0]
            lines[string.lineno - 1 : string.end_lineno] = [""] * (string.end_lineno - string.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def digest(thing: Any) -> str:
    """sha256 of `code_of`."""
    return hashlib.sha256(code_of(thing).encode()).hexdigest()


def trainer_code(name: str) -> Any | None:
    """The function of a method or property of `Trainer`; None for what is set on instances."""
    thing = inspect.getattr_static(Trainer, name, None)
    thing = thing.fget if isinstance(thing, property) else thing
    return thing.__func__ if isinstance(thing, (staticmethod, classmethod)) else thing


def imported(name: str) -> Any:
    """What `module.name` names."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


# Order of calls

HOOKS = (
    "train",
    "_inner_training_loop",
    "get_train_dataloader",
    "_get_dataloader",
    "_init_training_state",
    "_load_callback_state",
    "_prepare_for_training",
    "create_optimizer",
    "_wrap_model",
    "create_scheduler",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "training_step",
    "compute_loss_context_manager",
    "compute_loss",
    "floating_point_ops",
    "_track_num_input_tokens",
    "evaluate",
    "get_eval_dataloader",
    "evaluation_loop",
    "prediction_step",
    "_save_checkpoint",
    "_load_best_model",
)


class CallLog:
    """Calls in their order, a call inside another one two spaces deeper."""

    def __init__(self):
        self.lines: list[str] = []
        self.is_paused: Callable[[], bool] = lambda: False
        self._depth = 0

    def note(self, name: str) -> None:
        if not self.is_paused():
            self.lines.append("  " * self._depth + name)

    def wrap(self, name: str, function: Callable) -> Callable:
        """The function, noting each call."""

        def noted(*args, **kwargs):
            self.note(name)
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1

        return noted

    def hooks_only(self) -> list[str]:
        """Without the calls that a trainer of ours may make more often: of the model, its data and accelerate."""
        return [line for line in self.lines if not line.lstrip().startswith(("model.", "accelerator.", "collate"))]


class NotesEvents(TrainerCallback):
    """Notes every event of a training.

    Args:
        log: where.
    """

    def __init__(self, log: CallLog):
        for name in dir(TrainerCallback):
            if name.startswith("on_"):
                setattr(self, name, lambda *args, event=name, **kwargs: log.note(event))


def noting(trainer_class: type, log: CallLog) -> type:
    """A subclass that notes the calls of its hooks."""

    def noted(name: str) -> Callable:
        return lambda self, *args, **kwargs: log.wrap(name, getattr(super(cls, self), name))(*args, **kwargs)

    cls = type(trainer_class.__name__, (trainer_class,), {name: noted(name) for name in HOOKS})
    return cls


def note_what_it_holds(trainer: Trainer, log: CallLog) -> None:
    """Notes calls of the model, the collator and the accelerator as well."""
    model, accelerator = trainer.model, trainer.accelerator
    model_train, prepare = model.train, accelerator.prepare

    def train(mode=True):
        log.note("model.train" if mode else "model.eval")
        return model_train(mode)

    def noted_prepare(*args, **kwargs):
        log.note(f"accelerator.prepare({', '.join(type(arg).__name__ for arg in args)})")
        return prepare(*args, **kwargs)

    def rehearses() -> bool:
        session = getattr(trainer, "_session", None)
        return session is not None and session.proof.rehearsal.is_running

    log.is_paused = rehearses
    model.train, accelerator.prepare = train, noted_prepare
    accelerator.backward = log.wrap("accelerator.backward", accelerator.backward)
    trainer.data_collator = log.wrap("collate", trainer.data_collator)


# The record


_EMPTY = {"code": {}, "attributes": [], "chains": [], "imports": {}, "order": {}}


def load_record() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else copy.deepcopy(_EMPTY)


def current(orders: dict[str, list[str]]) -> dict[str, Any]:
    """The contract as the installed Transformers has it.

    Args:
        orders: calls of a training, by the training's name.
    """
    uses, version = uses_of_package(), transformers.__version__

    def entry(thing: Any, overridden: bool | None = None) -> dict[str, Any]:
        extra = {} if overridden is None else {"overridden": overridden}
        return {**extra, "signatures": [signature_of(thing)], "bodies": {digest(thing): version}}

    code = {name: trainer_code(name) for name in sorted(uses.names)}
    return {
        "code": {name: entry(thing, name in uses.overrides) for name, thing in code.items() if thing is not None},
        "attributes": [name for name, thing in code.items() if thing is None],
        "chains": sorted(uses.chains),
        "imports": {name: entry(imported(name)) for name in sorted(imports_of_package())},
        "order": orders,
    }


def renew(orders: dict[str, list[str]]) -> list[str]:
    """Adds the installed version's bodies and the package's new uses to the record; drops uses that are gone.

    Returns:
        What it leaves as it was, since a person has to look first: signatures and orders that have changed.
    """
    old, new = load_record(), current(orders)
    refused = []
    for section in ("code", "imports"):
        for name, entry in new[section].items():
            before = old[section].get(name)
            if before is None:
                continue
            [now] = entry["signatures"]
            if now not in before["signatures"]:
                refused.append(f"{name}: recorded {' and '.join(before['signatures'])}, now {now}")
            entry["signatures"] = before["signatures"]
            (body, version), bodies = *entry["bodies"].items(), before["bodies"]
            bodies[body] = " ".join(sorted({*bodies.get(body, "").split(), version}, key=_version_key))
            entry["bodies"] = dict(sorted(bodies.items(), key=lambda item: _version_key(item[1].split()[0])))
    for name, order in old["order"].items():
        if order != new["order"][name]:
            refused.append(f"order of a {name} training")
            new["order"][name] = order
    RECORD.write_text(json.dumps(new, indent=1) + "\n")
    return refused


def _version_key(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
