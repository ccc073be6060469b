"""What crosses a boundary in the run of a model, and what a replay from there need not run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from .record import Call, Record, TensorSpec, Value
from .structure import Path


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a run: in the arguments of a call, or in its output.

    Args:
        call: the call.
        path: of the tensor in its arguments or its output.
        spec: the tensor.
    """

    call: Call
    path: Path
    spec: TensorSpec


@dataclass(frozen=True)
class Boundary:
    """A moment of a run at which a replay can begin.

    Args:
        clock: the moment, on the record's clock.
        skipped: calls before it that a replay does not run.
        entry: call before which it lies, if the feature is put into its arguments; else into outputs of skipped calls.
        places: where the tensors are that cross it, those of one tensor together.
        frozen: names of the parameters on which they depend, and of those that belong to modules that only run before.
        shared: names of those of `frozen` that are read behind it as well, and not from an embedding table.
        tied: names of those of `frozen` that are embedding tables, read behind it as well.
        flops: of what is skipped, relative to the whole run.
        why_not: why a replay cannot begin here; None if it can.
    """

    clock: int
    skipped: tuple[Call, ...] = ()
    entry: Call | None = None
    places: tuple[tuple[Place, ...], ...] = ()
    frozen: frozenset[str] = frozenset()
    shared: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    flops: float = 0.0
    why_not: str | None = None


@dataclass
class _Crossing:
    """What of a run is known at a moment."""

    skipped: list[Call]
    inside: bytearray
    #: Values that only skipped calls make, with the call; and what follows from these without a call.
    made_by: dict[Value, Call]
    unknown: set[Value]
    crossing: set[Value] = field(default_factory=set)


class Flow:
    """Finds boundaries in a recorded run.

    Args:
        model: the model.
        record: its run.
        changing: names of the inputs whose values make the features: what depends on none of them is computed live.
        withheld: names of the inputs that do not exist in a replay.
    """

    def __init__(self, model: nn.Module, record: Record, changing: Iterable[str], withheld: Iterable[str]):
        self.model, self.record = model, record
        self._withheld = {record.inputs[name]: name for name in withheld if name in record.inputs}
        self._changing = {record.inputs[name] for name in changing if name in record.inputs} | set(self._withheld)
        self._tainted = set(self._changing)
        self._users: dict[Value, list[int]] = defaultdict(list)
        self._maker: dict[Value, int] = {}
        for number, operation in enumerate(record.operations):
            if operation.reads & self._tainted:
                self._tainted |= operation.writes
            for value in operation.writes:
                self._maker[value] = number
            for value in operation.reads:
                self._users[value].append(number)
        self._needed_operations = self._find_needed()
        self._total_flops = sum(operation.flops for operation in record.operations)
        self._last_end: dict[nn.Module, int] = {}
        for call in record.calls:
            self._last_end[call.module] = max(call.end, self._last_end.get(call.module, 0))
        self._embeddings = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
            for parameter, _ in module.named_parameters(recurse=False)
        }
        self._found: dict[tuple[int, bool], Boundary] = {}

    def before(self, call: Call) -> Boundary:
        """The boundary at the beginning of a call: the feature is put into its arguments."""
        return self._find(call, enters=True)

    def after(self, call: Call) -> Boundary:
        """The boundary at the end of a call: the features are put into outputs of skipped calls."""
        return self._find(call, enters=False)

    def is_changing(self, call: Call) -> bool:
        """Whether the output of a call depends on the samples."""
        return any(spec.value in self._tainted for spec in call.results.values())

    def _find(self, call: Call, enters: bool) -> Boundary:
        key = (call.begin if enters else call.end), enters
        if key not in self._found:
            moment, operation = (call.begin, call.first) if enters else (call.end, call.last)
            known = self._cross(moment, operation)
            found = self._enter(call, known, moment) if enters else self._leave(known, moment, operation)
            self._found[key] = found
        return self._found[key]

    def _find_needed(self) -> set[int]:
        """Numbers of the operations on which the answers depend, and of those that Python reads."""
        needed, numbers = set(self.record.answers), set()
        for number in range(len(self.record.operations) - 1, -1, -1):
            operation = self.record.operations[number]
            if operation.read_by_python or operation.writes & needed:
                needed |= operation.reads
                numbers.add(number)
        return numbers

    def _is_used_from(self, value: Value, operation: int) -> bool:
        """Whether a value is an answer, or an answer depends on a use of it from an operation on."""
        if value in self.record.answers:
            return True
        return any(user >= operation and user in self._needed_operations for user in self._users[value])

    def _cross(self, moment: int, operation: int) -> _Crossing:
        known = _Crossing([], bytearray(len(self.record.operations)), {}, set(self._withheld))
        open_calls = [self.record.calls[0]]
        work = [child for parent in open_calls for child in parent.children]
        while work:
            call = work.pop(0)
            if call.begin >= moment:
                continue
            if call.end > moment:
                work = [*call.children, *work]
                continue
            made = self._made(call)
            if made.isdisjoint(self._tainted):
                continue  # it does not depend on the samples: a replay computes it
            if any(self._is_used_from(value, call.last) for value in made - self._tainted):
                # It also makes what all samples share and what is used later (a position bias, rotary tables).
                work = [*call.children, *work]
                continue
            known.skipped.append(call)
            known.inside[call.first : call.last] = b"\1" * (call.last - call.first)
            for value in made & self._tainted:
                known.made_by[value] = call
        known.unknown |= set(known.made_by)
        read_by_python: set[Value] = set()
        for number in range(operation):
            if known.inside[number]:
                continue
            live = self.record.operations[number]
            if not live.reads.isdisjoint(known.unknown):
                known.unknown |= live.writes
                if live.read_by_python:
                    read_by_python |= live.reads & known.unknown
        known.crossing = {value for value in known.unknown if self._is_used_from(value, operation)} | read_by_python
        return known

    def _made(self, call: Call) -> set[Value]:
        made: set[Value] = set()
        for number in range(call.first, call.last):
            made |= self.record.operations[number].writes
        return made

    def _enter(self, call: Call, known: _Crossing, moment: int) -> Boundary:
        if len(known.crossing) != 1:
            return self._no(moment, f"{len(known.crossing)} values cross there")
        (value,) = known.crossing
        places = [Place(call, path, spec) for path, spec in call.arguments.items() if spec.value == value]
        elsewhere = [
            user
            for user in self._users[value]
            if user in self._needed_operations and user >= call.first and not call.first <= user < call.last
        ]
        if len({place.spec.place for place in places}) != 1 or elsewhere or value in self.record.answers:
            return self._no(moment, f"what crosses there is no argument of '{call.name}', or is used beside it")
        return self._boundary(known, moment, call, (tuple(places),), {value}, call.first)

    def _leave(self, known: _Crossing, moment: int, operation: int) -> Boundary:
        needed = set(known.crossing)
        for number in range(operation - 1, -1, -1):
            live = self.record.operations[number]
            if not known.inside[number] and not live.writes.isdisjoint(needed):
                needed |= live.reads & known.unknown
        roots = {value for value in needed if value in known.made_by or value in self._withheld}
        inputs = sorted(self._withheld[value] for value in roots if value in self._withheld)
        if inputs:
            return self._no(moment, f"the model's input {inputs[0]!r} is used behind it")
        tensors: dict[tuple, list[Place]] = {}
        for value in sorted(roots, key=lambda value: self._maker[value]):
            call = known.made_by[value]
            places = [Place(call, path, spec) for path, spec in call.results.items() if spec.value == value]
            if not places:
                return self._no(moment, f"a tensor leaves '{call.name}' beside its output")
            for place in places:
                tensors.setdefault((value, place.spec.shape, place.spec.place), []).append(place)
        return self._boundary(known, moment, None, tuple(map(tuple, tensors.values())), roots, operation)

    def _boundary(
        self,
        known: _Crossing,
        moment: int,
        entry: Call | None,
        places: tuple[tuple[Place, ...], ...],
        values: set[Value],
        operation: int,
    ) -> Boundary:
        frozen = self._depended(values, operation) | self._owned(moment)
        both = sorted(frozen & self._read_behind(known, operation))
        flops = sum(self.record.operations[n].flops for n in range(operation) if known.inside[n])
        return Boundary(
            moment,
            tuple(sorted(known.skipped, key=lambda call: call.begin)),
            entry,
            places,
            frozenset(frozen),
            tuple(name for name in both if name not in self._embeddings),
            tuple(name for name in both if name in self._embeddings),
            flops / max(1.0, self._total_flops),
        )

    def _depended(self, values: set[Value], operation: int) -> set[str]:
        """Names of the parameters on which values depend that were made before an operation."""
        behind = set(values)
        for number in range(operation - 1, -1, -1):
            if not self.record.operations[number].writes.isdisjoint(behind):
                behind |= self.record.operations[number].reads
        return {self.record.parameters[storage] for storage, _ in behind if storage in self.record.parameters}

    def _read_behind(self, known: _Crossing, operation: int) -> set[str]:
        """Names of the parameters that a replay from an operation on reads, also for what it computes before it."""
        read: set[Value] = set()
        for number in range(len(self.record.operations) - 1, -1, -1):
            live = self.record.operations[number]
            if number >= operation:
                read |= live.reads if number in self._needed_operations else set()
            elif not known.inside[number] and not live.writes.isdisjoint(read - known.unknown):
                read |= live.reads
        return {self.record.parameters[storage] for storage, _ in read if storage in self.record.parameters}

    def _owned(self, moment: int) -> set[str]:
        modules = set(self.closed_modules(moment))
        owned = {id(p) for module in modules for p in module.parameters(recurse=False)}
        return {name for name, parameter in self.model.named_parameters() if id(parameter) in owned}

    def closed_modules(self, moment: int) -> list[nn.Module]:
        """Modules that run before a moment and not after it, what is within them included."""
        later = {module for module, end in self._last_end.items() if end > moment}
        closed = [module for module, end in self._last_end.items() if end <= moment]
        return list({part: None for module in closed for part in module.modules() if part not in later})

    def open_modules(self, moment: int) -> list[nn.Module]:
        """Modules that run both before a moment and after it."""
        begun = {call.module for call in self.record.calls if call.begin <= moment}
        return [module for module, end in self._last_end.items() if end > moment and module in begun]

    def last_before(self, moment: int) -> Call:
        """The call that ends at a moment."""
        return next(call for call in self.record.calls if call.end == moment)

    def _no(self, moment: int, why: str) -> Boundary:
        return Boundary(moment, why_not=why)


def crossing_names(boundary: Boundary) -> Sequence[str]:
    """The tensors that cross a boundary, in words."""
    return [
        f"the {'input' if boundary.entry is not None else 'output'} of '{first.call.name}' {first.spec.shape}"
        for first, *_ in boundary.places
    ]
