"""The record of one run of a model: calls of its modules, operations, and the values that these read and write."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.utils import logging

from ..distributed import Announcer
from ..rng import preserve_rng
from .errors import ChainError
from .inputs import main_input_name
from .modes import ModuleStates, eval_mode, override_forward
from .repeats import Repeats, Value, is_plain, watching_reads
from .structure import Path, leaves, map_leaves

logger = logging.get_logger(__name__)

#: Operations whose result does not depend on the values of what they are called on.
_SHAPE_ONLY = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty "
    "new_full new_empty_strided empty_strided".split()
)
#: Operations that give a value to Python, which may branch on it.
_READ_BY_PYTHON = frozenset({"_local_scalar_dense", "is_nonzero", "equal"})
#: A model of fewer parameters runs faster as a whole than it is found out what of a run repeats.
FEW_PARAMETERS = 1_000_000
#: FLOPs that count for each number of an operation for which no formula is known, so that no block is free.
_FLOPS_OF_A_NUMBER = 0.1


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor in the arguments or the output of a call.

    Args:
        value: its value at the end of the call.
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor.
        place: offset and strides within its storage: two of the same value and place are one tensor.
        per_sample: for every dimension, its size for each sample; None if it does not depend on their number.
        per_token: for every dimension, by how much it grows (for each sample) with the width of the texts.
    """

    value: Value
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    place: tuple[Any, ...] = ()
    per_sample: tuple[int | None, ...] = ()
    per_token: tuple[int, ...] = ()

    @property
    def sample_dim(self) -> int | None:
        """The dimension that the samples are; None if there is none, or several."""
        dims = [dim for dim, size in enumerate(self.per_sample) if size is not None]
        return dims[0] if len(dims) == 1 else None

    @property
    def is_feature(self) -> bool:
        """Whether it can be stored sample by sample: floating-point numbers with one dimension for the samples."""
        floats = self.dtype in (torch.float32, torch.float16, torch.bfloat16)
        is_dense = bool(self.place)  # a sparse tensor has no strides
        return floats and is_dense and self.sample_dim is not None and len(self.shape) > 1

    def shape_for(self, samples: int, wider: int = 0) -> tuple[int, ...]:
        """Its shape in another batch.

        Args:
            samples: of the batch.
            wider: by how many positions its texts are wider than those of the recorded run.
        """
        per_sample = self.per_sample or (None,) * len(self.shape)
        growths = self.per_token or (0,) * len(self.shape)
        return tuple(
            size + growth * wider if own is None else (own + growth * wider) * samples
            for size, own, growth in zip(self.shape, per_sample, growths, strict=True)
        )


@dataclass(eq=False)
class Call:
    """One call of a module.

    Args:
        module: the module.
        name: its name in the model.
        nth: how often it was called before.
        parent: the call within which it was called.
        begin, end: when, on a clock that ticks at each beginning and end of a call.
        first, last: numbers of the operations within it: `first <= number < last`.
        arguments: path -> tensor.
        results: path -> tensor.
        output: what it returned, tensors replaced by their specifications.
        children: calls within it.
    """

    module: nn.Module
    name: str
    nth: int
    parent: Call | None
    begin: int
    first: int
    end: int = -1
    last: int = -1
    arguments: dict[Path, TensorSpec] = field(default_factory=dict)
    results: dict[Path, TensorSpec] = field(default_factory=dict)
    output: Any = None
    children: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class Operation:
    """One operation on tensors.

    Args:
        reads: values on which it depends.
        writes: values that it makes.
        flops: of it, roughly.
        read_by_python: whether it gives a value to Python, which may branch on it.
    """

    reads: frozenset[Value]
    writes: frozenset[Value]
    flops: float
    read_by_python: bool


@dataclass(frozen=True, eq=False)
class Record:
    """One run of a model.

    Args:
        samples: rows of the inputs.
        inputs: values of the inputs by name.
        calls: all calls, in the order in which they began; the first is the model's own.
        operations: all operations, in their order.
        answers: values that the training needs: loss and logits, or everything that the model returns.
        parameters: name of the parameter in a storage.
    """

    samples: int
    inputs: dict[str, Value]
    calls: list[Call]
    operations: list[Operation]
    answers: frozenset[Value]
    parameters: dict[int, str]
    _live: dict[tuple[Call, ...], dict[nn.Module, list[Call]]] = field(default_factory=dict)

    def live_calls(self, skipped: tuple[Call, ...]) -> dict[nn.Module, list[Call]]:
        """The calls of every module that happen where others are skipped; a skipped call itself counts as one."""
        if skipped not in self._live:
            ends = sorted((call.begin, call.end) for call in skipped)
            live: dict[nn.Module, list[Call]] = {}
            position = 0
            for call in self.calls:  # in the order of their beginnings
                while position < len(ends) and ends[position][1] < call.begin:
                    position += 1
                if position == len(ends) or ends[position][0] >= call.begin:
                    live.setdefault(call.module, []).append(call)
            self._live[skipped] = live
        return self._live[skipped]


class _Recorder(TorchDispatchMode):
    """Records the operations and the calls of one run.

    Args:
        model: the model.
        inputs: its inputs by name.
        repeats: whether heavy operations that repeat others are done as well; see `Repeats`.

    Attributes:
        inputs: values of the inputs by name.
        answers: see `Record`.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], repeats: bool):
        super().__init__()
        self.calls: list[Call] = []
        self.operations: list[Operation] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._open: list[Call] = []
        self._clock = 0
        self._versions: dict[int, int] = defaultdict(int)
        self._times_called: dict[nn.Module, int] = defaultdict(int)
        #: What keeps an address from being given to another storage, or to another tensor that has none.
        self._kept: dict[int, StorageWeakRef | torch.Tensor] = {}
        self.inputs = {name: self.value(value) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.answers: frozenset[Value] = frozenset()
        self.repeats = repeats
        self._repeats = None if repeats else Repeats({self.value(tensor) for _, tensor in leaves(inputs)})

    def run(self, model: nn.Module, inputs: Mapping[str, Any], operations: bool = True) -> None:
        """Runs the model in eval mode and without gradients.

        Args:
            model: the model.
            inputs: its inputs by name.
            operations: whether operations are recorded, beside calls.

        Raises:
            ChainError: if it does not run.
        """
        watching = (
            contextlib.nullcontext() if self._repeats is None else watching_reads(self._is_unknown, self._repeats.need)
        )
        with _recording(model, self, inputs), watching:
            with self if operations else contextlib.nullcontext():
                output = model(**inputs)
            self.answers = frozenset(self.value(tensor) for tensor in answers_of(output).values())

    @property
    def why_not(self) -> str | None:
        """Why the record may not be that of a run that does everything; None if it is."""
        if self._repeats is None or self._repeats.why_needed is not None:
            return None if self._repeats is None else self._repeats.why_needed
        kept = (self._kept[address] for address, _ in self._repeats.unknown)
        if all(isinstance(reference, StorageWeakRef) and reference.expired() for reference in kept):
            return None
        return "a tensor that was not computed is kept"

    def value(self, tensor: torch.Tensor) -> Value:
        """The value that a tensor has now."""
        try:
            reference = StorageWeakRef(tensor.untyped_storage())
            address = reference.cdata
            self._kept.setdefault(address, reference)
        except NotImplementedError:  # a sparse tensor has no storage: it is its own
            address = id(tensor)
            self._kept.setdefault(address, tensor)
        return address, self._versions[address]

    def _is_unknown(self, tensor: torch.Tensor) -> bool:
        """Whether the values of a tensor, maybe of another thread, were not computed."""
        assert self._repeats is not None
        if not is_plain(tensor):
            return False
        address = StorageWeakRef(tensor.untyped_storage()).cdata
        return (address, self._versions.get(address, 0)) in self._repeats.unknown

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given: dict[Value, list[torch.Tensor]] = defaultdict(list)
        for _, tensor in leaves((args, kwargs)):
            given[self.value(tensor)].append(tensor)
        read = {} if name in _SHAPE_ONLY else given
        written = [tensor for value in _written(func, args, kwargs) for _, tensor in leaves(value)]
        storages = {self.value(tensor)[0] for tensor in written}
        is_unknown = False
        if self._repeats is None:
            output = func(*args, **kwargs)
        else:
            output, is_unknown = self._repeats.run(func, args, kwargs, read, storages)
        for storage in storages:
            self._versions[storage] += 1
        made = frozenset(self.value(tensor) for _, tensor in leaves((output, written))) - given.keys()
        if self._repeats is not None:
            own = {storage for storage, _ in made} - {storage for storage, _ in given}
            self._repeats.follow(read.keys(), made, is_unknown, own)
        # A view has the value of what it is a view of: it neither reads nor makes one.
        flops = _flops(func, args, kwargs, output)
        self.operations.append(Operation(frozenset(read), made, flops, name in _READ_BY_PYTHON))
        return output

    def wrap(self, module: nn.Module) -> Callable[[Callable], Callable]:
        """Makes the `forward` that records its calls."""

        def wrapper(original: Callable) -> Callable:
            def forward(*args, **kwargs):
                call = self._begin(module, args, kwargs)
                output = original(*args, **kwargs)
                self._end(call, output)
                return output

            return forward

        return wrapper

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        parent = self._open[-1] if self._open else None
        self._clock += 1
        call = Call(module, self._names[module], self._times_called[module], parent, self._clock, len(self.operations))
        self._times_called[module] += 1
        call.arguments = {path: self._describe(tensor) for path, tensor in leaves((args, kwargs))}
        if parent is not None:
            parent.children.append(call)
        self.calls.append(call)
        self._open.append(call)
        return call

    def _end(self, call: Call, output: Any) -> None:
        self._open.pop()
        self._clock += 1
        call.end, call.last = self._clock, len(self.operations)
        call.results = {path: self._describe(tensor) for path, tensor in leaves(output)}
        call.output = _with_specs(output, call.results)

    def _describe(self, tensor: torch.Tensor) -> TensorSpec:
        place = (tensor.storage_offset(), tensor.stride()) if tensor.layout is torch.strided else ()
        return TensorSpec(self.value(tensor), tuple(tensor.shape), tensor.dtype, tensor.device, place)


def record_run(
    model: nn.Module, inputs: Mapping[str, Any], samples: int, narrower: Mapping[str, Any] | None = None
) -> Record:
    """Runs a model in eval mode and records the run, and runs it once more with one sample more.

    The second run tells which dimensions of the tensors grow with the number of samples; a third one, on texts of one
    position less, which grow with their width. A record holds no values, so that most of the work of these runs is
    left out; see `Repeats`.

    Args:
        model: the model; left as it is.
        inputs: its inputs by name.
        samples: rows of them.
        narrower: the same inputs with one position less; None: they are no texts, or of a single width.

    Raises:
        ChainError: if the model does not run.
    """
    recorder = _record(model, inputs)
    # Where the first run needs all its operations, the others would as well.
    larger = _record_calls(model, with_one_more_sample(inputs, samples), recorder)
    _relate(recorder, larger, lambda specs, others: _scaled(specs, others, samples))
    if narrower is not None:
        try:
            _relate(recorder, _record_calls(model, narrower, recorder), _widened)
        except ChainError as error:
            Announcer.survived(logger, f"{type(model).__name__} does not run on texts of another width", error)
    for call in recorder.calls:
        call.output = _with_specs(call.output, call.results)
    parameters = {recorder.value(parameter)[0]: name for name, parameter in model.named_parameters()}
    return Record(samples, recorder.inputs, recorder.calls, recorder.operations, recorder.answers, parameters)


def _record(model: nn.Module, inputs: Mapping[str, Any]) -> _Recorder:
    """Records a run; one that leaves out heavy operations that repeat others, unless something needs their values."""
    is_script = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())  # reads are not seen
    if not is_script and sum(parameter.numel() for parameter in model.parameters()) >= FEW_PARAMETERS:
        before = ModuleStates(model)
        recorder = _Recorder(model, inputs, repeats=False)
        try:
            recorder.run(model, inputs)
            why = recorder.why_not
        except ChainError as error:
            why = recorder.why_not or str(error)
        if why is None:
            return recorder
        before.restore()
        logger.debug(f"{type(model).__name__} is recorded with all its operations: {why}")
    recorder = _Recorder(model, inputs, repeats=True)
    recorder.run(model, inputs)
    return recorder


def _record_calls(model: nn.Module, inputs: Mapping[str, Any], first: _Recorder) -> _Recorder:
    """Records a run of which the calls alone count, as an earlier one was recorded."""
    if not first.repeats:
        return _record(model, inputs)
    recorder = _Recorder(model, inputs, repeats=True)
    recorder.run(model, inputs, operations=False)
    return recorder


def _relate(recorder: _Recorder, other: _Recorder, relate: Callable) -> None:
    """Compares the tensors of every call with those of the same call in another run."""
    others = {(call.module, call.nth): call for call in other.calls}
    for call in recorder.calls:
        found = others.get((call.module, call.nth))
        if found is not None:
            call.arguments = relate(call.arguments, found.arguments)
            call.results = relate(call.results, found.results)


def answers_of(output: Any) -> dict[Path, torch.Tensor]:
    """The tensors in a model's output that a training needs: loss and logits; all of them where it names none."""
    if isinstance(output, Mapping):
        named = {
            name: value
            for name, value in output.items()
            if isinstance(name, str) and (name == "loss" or name.endswith("logits"))
        }
        output = named or output
    return dict(leaves(output))


def with_one_more_sample(inputs: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """The same batch with its first sample once more at the end."""

    def extend(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == samples:
            return torch.cat([value, value[:1]])
        return value

    return {name: extend(value) for name, value in inputs.items()}


@contextlib.contextmanager
def _recording(model: nn.Module, recorder: _Recorder, inputs: Mapping[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserve_rng())
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.enter_context(override_forward(module, recorder.wrap(module)))
        try:
            yield
        except Exception as error:  # the model's own code may raise anything
            why = f"{type(model).__name__} could not be run on a probe batch: {error!r}"
            raise ChainError(why + _describe_packed(model, inputs)) from error


def _describe_packed(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Says which input has other rows than one for each sample, as a sentence to append; empty if none has."""
    samples = len(inputs[main_input_name(model)])
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.ndim and len(value) not in (1, samples):
            return (
                f". '{name}' has {len(value)} rows, and '{main_input_name(model)}' {samples}: samples whose parts lie "
                "one after the other in a batch (patches of images of several sizes) cannot be taken apart, and no "
                "block can be frozen. policy='none' trains as `Trainer` does"
            )
    return ""


def _with_specs(output: Any, specs: Mapping[Path, TensorSpec]) -> Any:
    return map_leaves(lambda path, leaf: specs.get(path, leaf), output)


def _scaled(
    specs: Mapping[Path, TensorSpec], larger: Mapping[Path, TensorSpec], samples: int
) -> dict[Path, TensorSpec]:
    """The specifications with what grows with the number of samples; `larger` are those with one sample more."""

    def scale(path: Path, spec: TensorSpec) -> TensorSpec:
        other = larger.get(path)
        if other is None or len(other.shape) != len(spec.shape):
            return spec
        sizes = zip(spec.shape, other.shape, strict=True)
        # One sample more adds what each of the others has; a size that grows otherwise is not made of samples.
        grows = tuple(b - a if b > a and a == (b - a) * samples else None for a, b in sizes)
        return replace(spec, per_sample=grows)

    return {path: scale(path, spec) for path, spec in specs.items()}


def _widened(specs: Mapping[Path, TensorSpec], narrower: Mapping[Path, TensorSpec]) -> dict[Path, TensorSpec]:
    """The specifications with what grows with the width of the texts; `narrower` are those of one position less."""

    def widen(path: Path, spec: TensorSpec) -> TensorSpec:
        other = narrower.get(path)
        if other is None or len(other.shape) != len(spec.shape):
            return spec
        per_sample = spec.per_sample or (None,) * len(spec.shape)
        growths = [
            a - b if own is None or not own else (a - b) * own // a
            for a, b, own in zip(spec.shape, other.shape, per_sample, strict=True)
        ]
        return replace(spec, per_token=tuple(growths))

    return {path: widen(path, spec) for path, spec in specs.items()}


def _written(function: Any, args: tuple, kwargs: dict) -> list[Any]:
    """Arguments that an operation writes to."""
    written = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return written


def _flops(function: Any, args: tuple, kwargs: dict, output: Any) -> float:
    formula = flop_registry.get(function._overloadpacket)
    if formula is not None:
        try:
            return float(formula(*args, **kwargs, out_val=output))
        except Exception as error:  # a formula that does not know these arguments; FLOPs only say what a block is
            Announcer.trace(logger, f"The FLOPs of {function} are estimated by the size of its result", error)
    if any(returned.alias_info is not None for returned in function._schema.returns):
        return 0.0  # a view
    return _FLOPS_OF_A_NUMBER * sum(tensor.numel() for _, tensor in leaves(output))
