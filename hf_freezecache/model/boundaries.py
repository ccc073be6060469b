"""What crosses a boundary in the run of a model, and what a replay from there need not run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
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
        has_parameters_behind: whether something is left to train: parameters that are not frozen are read behind it.
        flops: of what is skipped, relative to the whole run.
        inputs: names of the inputs on which the tensors that cross it depend.
        why_not: why a replay cannot begin here; None if it can.
    """

    clock: int
    skipped: tuple[Call, ...] = ()
    entry: Call | None = None
    places: tuple[tuple[Place, ...], ...] = ()
    frozen: frozenset[str] = frozenset()
    shared: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    has_parameters_behind: bool = True
    flops: float = 0.0
    inputs: frozenset[str] = frozenset()
    why_not: str | None = None


@dataclass
class _Crossing:
    """What of a run is known at a moment."""

    skipped: list[Call]
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
        self._names = list(dict.fromkeys(record.parameters.values()))
        bits = {name: 1 << number for number, name in enumerate(self._names)}
        self._bits = {storage: bits[name] for storage, name in record.parameters.items()}
        self._bit_of = {id(parameter): bits[name] for name, parameter in model.named_parameters()}
        self._tainted = set(self._changing)
        #: Parameters on which a value depends, as bits; and inputs.
        self._depends: dict[Value, int] = {}
        self._inputs_of = {value: frozenset({name}) for name, value in record.inputs.items()}
        #: Inputs whose values Python has read: anything may depend on them.
        self._read_by_python: frozenset[str] = frozenset()
        self._users: dict[Value, list[int]] = defaultdict(list)
        self._maker: dict[Value, int] = {}
        for number, operation in enumerate(record.operations):
            if operation.reads & self._tainted:
                self._tainted |= operation.writes
            depends = self._depended(operation.reads)
            inputs = self._depended_inputs(operation.reads)
            if operation.read_by_python:
                self._read_by_python |= inputs
            for value in operation.writes:
                self._maker[value], self._depends[value] = number, depends
                if inputs:
                    self._inputs_of[value] = inputs
            for value in operation.reads:
                self._users[value].append(number)
        self._needed_operations = self._find_needed()
        #: The last operation on which an answer depends that reads a value; beyond all operations for the answers.
        self._last_use = {
            value: max((user for user in users if user in self._needed_operations), default=-1)
            for value, users in self._users.items()
        }
        self._last_use |= dict.fromkeys(record.answers, len(record.operations))
        #: Parameters that operations from a number on read, as bits.
        self._read_from = [0]
        self._flops = [0.0]
        for number in range(len(record.operations) - 1, -1, -1):
            reads = record.operations[number].reads if number in self._needed_operations else ()
            self._read_from.append(self._read_from[-1] | self._own_bits(reads))
        self._read_from.reverse()
        for operation in record.operations:
            self._flops.append(self._flops[-1] + operation.flops)
        self._made_in: dict[Call, frozenset[Value]] = {}
        self._times = Counter(call.module for call in record.calls)
        self._last_end: dict[nn.Module, int] = {}
        for call in record.calls:
            self._last_end[call.module] = max(call.end, self._last_end.get(call.module, 0))
        #: Parameters of each module that runs, with those of the modules within it that do not run themselves.
        self._bits_of_module = {module: self._bits_within(module) for module in self._last_end}
        self._embeddings = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
            for parameter, _ in module.named_parameters(recurse=False)
        }
        self._found: dict[tuple[int, bool], Boundary] = {}
        self._open: dict[int, list[nn.Module]] = {}

    def behind(self, call: Call, following: Call | None = None, most: int = 1) -> Boundary:
        """The boundary behind a call at which a single tensor crosses, or as few as can be stored.

        Args:
            call: the call.
            following: one that runs later: what it gets is preferred to what the call gives.
            most: tensors that may cross.
        """
        single = self._behind(call, following)
        if single.why_not is None or most == 1:
            return single
        several = self._storable(self.after(call), most)
        return several if several.why_not is None else single

    def into(self, call: Call, most: int = 1) -> Boundary:
        """The boundary at the beginning of a call, or behind what has run before it.

        Args:
            call: the call.
            most: tensors that may cross.
        """
        before = self._single(self.before(call))
        last = max((other for other in self.record.calls if other.end < call.begin), key=lambda other: other.end)
        return before if before.why_not is None else self.behind(last, call, most)

    def _behind(self, call: Call, following: Call | None) -> Boundary:
        if following is not None and (before := self._single(self.before(following))).why_not is None:
            return before
        after, other = self._single(self.after(call)), self._next(call)
        if after.why_not is None or other is None:
            return after
        before = self._single(self.before(other))
        return before if before.why_not is None else after

    def _next(self, call: Call) -> Call | None:
        """The first call behind another one that depends on the samples."""
        return next((other for other in self.record.calls if other.begin > call.end and self.is_changing(other)), None)

    def before(self, call: Call) -> Boundary:
        """The boundary at the beginning of a call: the feature is put into its arguments."""
        return self._find(call, enters=True)

    def after(self, call: Call) -> Boundary:
        """The boundary at the end of a call: the features are put into outputs of skipped calls."""
        return self._find(call, enters=False)

    def runs_once(self, module: nn.Module) -> bool:
        """Whether a module is called once in the run."""
        return self._times[module] == 1

    def share(self, call: Call) -> float:
        """FLOPs of a call relative to the whole run."""
        return (self._flops[call.last] - self._flops[call.first]) / max(1.0, self._flops[-1])

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
        return self._last_use.get(value, -1) >= operation

    def _own_bits(self, values: Iterable[Value]) -> int:
        bits = 0
        for storage, _ in values:
            bits |= self._bits.get(storage, 0)
        return bits

    def _depended(self, values: Iterable[Value]) -> int:
        """Parameters on which values depend, as bits."""
        bits = 0
        for value in values:
            bits |= self._depends.get(value, 0) | self._bits.get(value[0], 0)
        return bits

    def _depended_inputs(self, values: Iterable[Value]) -> frozenset[str]:
        """Inputs on which values depend."""
        found = [self._inputs_of[value] for value in values if value in self._inputs_of]
        return frozenset().union(*found) if found else frozenset()

    def _bits_within(self, module: nn.Module) -> int:
        bits = 0
        for parameter in module.parameters(recurse=False):
            bits |= self._bit_of.get(id(parameter), 0)
        for child in module.children():
            if child not in self._last_end:
                bits |= self._bits_within(child)
        return bits

    def _named(self, bits: int) -> frozenset[str]:
        return frozenset(name for number, name in enumerate(self._names) if bits >> number & 1)

    def _cross(self, moment: int, operation: int) -> _Crossing:
        known = _Crossing([], {}, set(self._withheld))
        work = list(self.record.calls[0].children)
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
            for value in made & self._tainted:
                known.made_by[value] = call
        known.unknown |= known.made_by.keys()
        read_by_python: set[Value] = set()
        for number in self._live(known, operation):
            live = self.record.operations[number]
            if not live.reads.isdisjoint(known.unknown):
                known.unknown |= live.writes
                if live.read_by_python:
                    read_by_python |= live.reads & known.unknown
        known.crossing = {value for value in known.unknown if self._is_used_from(value, operation)} | read_by_python
        return known

    def _live(self, known: _Crossing, operation: int) -> Iterator[int]:
        """Numbers of the operations before one that no skipped call contains."""
        begin = 0
        for call in sorted(known.skipped, key=lambda call: call.first):
            yield from range(begin, call.first)
            begin = max(begin, call.last)
        yield from range(begin, operation)

    def _made(self, call: Call) -> frozenset[Value]:
        if call not in self._made_in:
            operations = self.record.operations[call.first : call.last]
            self._made_in[call] = frozenset().union(*(operation.writes for operation in operations))
        return self._made_in[call]

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
        for number in reversed(list(self._live(known, operation))):
            live = self.record.operations[number]
            if not live.writes.isdisjoint(needed):
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
        frozen = self._depended(values) | self._owned(moment)
        # What a replay computes before it for all samples, and reads behind it, counts as read behind it.
        shared = {
            value
            for number in self._live(known, operation)
            for value in self.record.operations[number].writes
            if value not in known.unknown and self._is_used_from(value, operation)
        }
        read = self._read_from[operation] | self._depended(shared)
        both = sorted(self._named(frozen & read))
        flops = sum(self._flops[call.last] - self._flops[call.first] for call in known.skipped)
        return Boundary(
            moment,
            tuple(sorted(known.skipped, key=lambda call: call.begin)),
            entry,
            places,
            self._named(frozen),
            tuple(name for name in both if name not in self._embeddings),
            tuple(name for name in both if name in self._embeddings),
            bool(read & ~frozen),
            flops / max(1.0, self._flops[-1]),
            self._depended_inputs(values) | self._read_by_python,
        )

    def _owned(self, moment: int) -> int:
        """Parameters of the modules that only run before a moment, as bits."""
        bits = 0
        for module, end in self._last_end.items():
            if end <= moment:
                bits |= self._bits_of_module[module]
        return bits

    def closed_modules(self, moment: int) -> list[nn.Module]:
        """Modules that run before a moment and not after it, what is within them included."""
        later = {module for module, end in self._last_end.items() if end > moment}
        closed = [module for module, end in self._last_end.items() if end <= moment]
        return list({part: None for module in closed for part in module.modules() if part not in later})

    def open_modules(self, moment: int) -> list[nn.Module]:
        """Modules that run both before a moment and after it."""
        if moment not in self._open:
            begun = {call.module for call in self.record.calls if call.begin <= moment}
            self._open[moment] = [module for module, end in self._last_end.items() if end > moment and module in begun]
        return self._open[moment]

    def last_before(self, moment: int) -> Call:
        """The call that ends at a moment."""
        return next(call for call in self.record.calls if call.end == moment)

    def _no(self, moment: int, why: str) -> Boundary:
        return Boundary(moment, why_not=why)

    def _single(self, boundary: Boundary) -> Boundary:
        return self._storable(boundary, 1)

    def _storable(self, boundary: Boundary, most: int) -> Boundary:
        """The boundary; with a reason why not if something else crosses it than so many tensors that can be stored."""
        if boundary.why_not is not None:
            return boundary
        if not boundary.places:
            return self._no(boundary.clock, "nothing that comes behind it depends on the samples")
        if len(boundary.places) > most:
            return self._no(
                boundary.clock,
                f"{len(boundary.places)} tensors cross it, not {'one' if most == 1 else f'up to {most}'} (skip "
                f"connections, input-dependent side channels): {', '.join(crossing_names(boundary))}",
            )
        spec = next((first.spec for first, *_ in boundary.places if not first.spec.is_feature), None)
        if spec is None:
            return boundary
        return self._no(
            boundary.clock,
            f"what crosses it ({spec.shape}, {spec.dtype}) does not have one row of floating-point numbers per sample",
        )


def crossing_names(boundary: Boundary) -> Sequence[str]:
    """The tensors that cross a boundary, in words."""
    return [
        f"the {'input' if boundary.entry is not None else 'output'} of '{first.call.name}' {first.spec.shape}"
        for first, *_ in boundary.places
    ]
