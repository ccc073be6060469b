"""The processes of a training: who decides, who agrees, and how DistributedDataParallel learns of a freeze."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import logging
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

T = TypeVar("T")

# Renamed by PyTorch; the attribute kept the old name.
_BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


#: Is told what the main process says; None: nobody listens.
_LISTENER: contextvars.ContextVar[Callable[[str], None] | None] = contextvars.ContextVar("listener", default=None)

#: How many `Group.on_all` this process is in.
_DEPTH: contextvars.ContextVar[int] = contextvars.ContextVar("depth", default=0)


class _Told(BaseException):
    """Another process has failed in a step that this one is in. Nothing handles it before that step's end.

    Args:
        depth: of the step, see `Group._tell`.
        error: what the other one has raised.
    """

    def __init__(self, depth: int, error: Exception):
        super().__init__(depth, error)
        self.depth, self.error = depth, error


@dataclass(frozen=True)
class Group:
    """The processes that train together; small objects only pass between them, never features."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which decides and logs."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        self._hear_failures()
        return self._broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process."""
        if self.size == 1:
            return [value]
        self._hear_failures()
        return self._gather(value)

    def on_all(self, step: Callable[[], T]) -> T:
        """Runs a step on every process; if it fails on one, it fails on all, with one error.

        Processes may exchange values within the step. One that waits there for a process that has failed is told so.

        Returns:
            This process's own result.

        Raises:
            Exception: what the failing process with the lowest rank has raised; elsewhere its message names the rank.
        """
        if self.size == 1:
            return step()
        depth, result, failure = _DEPTH.get() + 1, None, None
        token = _DEPTH.set(depth)
        try:
            result = step()
        except _Told as heard:
            if heard.depth < depth:
                raise
            raise heard.error from None
        except Exception as error:  # sent around first, so that no process waits for one that is gone
            failure = error
        finally:
            _DEPTH.reset(token)
        told = self._tell(depth, failure)
        if told is None:
            return cast(T, result)
        if told.depth < depth:
            raise told
        raise told.error

    def _hear_failures(self) -> None:
        """Before an exchange within `on_all`: another process may have failed, and take part in none.

        Raises:
            _Told: if one has.
        """
        depth = _DEPTH.get()
        told = self._tell(depth, None) if depth else None
        if told is not None:
            raise told

    def _tell(self, depth: int, failure: Exception | None) -> _Told | None:
        """Sends around that a step has failed here, or has not; the others may be at its end or inside.

        Args:
            depth: how many `on_all` the step is in, its own included.
            failure: its error; None if there is none.

        Returns:
            The failure that counts for all processes, that of the outermost step: they go on from one place.
        """
        sent = self._gather(None if failure is None else (depth, _pickled(failure)))
        failures = [(entry[0], rank) for rank, entry in enumerate(sent) if entry is not None]
        if not failures:
            return None
        outermost, rank = min(failures)
        if rank == self.rank and failure is not None:
            return _Told(outermost, failure)
        return _Told(outermost, _name_process(pickle.loads(sent[rank][1]), self.number(rank)))

    def _broadcast(self, value: Any) -> Any:
        box = [value if self.is_main else None]
        broadcast_object_list(box, from_process=0)
        return box[0]

    def _gather(self, value: Any) -> list[Any]:
        return gather_object([value])

    def number(self, rank: int) -> int:
        """The number by which people know a process, by its rank here."""
        return rank

    def on_main(self, step: Callable[[], T]) -> T:
        """Runs a step on the main process; its result, or its failure, is everybody's."""
        return self.broadcast(self.on_all(lambda: step() if self.is_main else None))

    def meet(self, place: str, seconds: float) -> bool:
        """Waits until all processes come to a place, without an operation between them: others may be in one.

        Args:
            place: its name; a new one for each meeting.
            seconds: how long it waits.

        Returns:
            Whether all have come. The others may be told so though this process has given up: then it must end.
        """
        if self.size == 1:
            return True
        store = distributed_c10d._get_default_store()
        if store.add(place, 1) == self.size:
            store.set(f"{place}/all", "here")
        try:
            store.wait([f"{place}/all"], timedelta(seconds=seconds))
        except torch.distributed.DistStoreError:
            return False
        return True

    def my_ranges(self, ranges: int) -> range:
        """The contiguous part of `ranges` ranges of samples that is this process's."""
        return range(ranges * self.rank // self.size, ranges * (self.rank + 1) // self.size)

    def any(self, value: bool, device: torch.device) -> bool:
        """Whether a value is true on some process; at once, as before every step.

        Args:
            value: this process's.
            device: on which the processes communicate.
        """
        if self.size == 1:
            return value
        found = torch.tensor(int(value), device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return bool(found.item())

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites the tensors with those of the main process, in place."""
        if self.size > 1:
            self._hear_failures()
            for tensor in tensors:
                sent = tensor.contiguous()
                torch.distributed.broadcast(sent, src=0)
                if sent is not tensor:
                    tensor.copy_(sent)

    def average_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites the tensors with their mean over all processes, in place."""
        if self.size > 1:
            self._hear_failures()
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)
                tensor /= self.size


def count_operations() -> int:
    """How many operations between processes this one has begun, those of `DistributedDataParallel` included."""
    if not torch.distributed.is_initialized():
        return 0
    try:
        groups = distributed_c10d._world.pg_map
        return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]  # no stub
    except RuntimeError:  # a backend that does not count
        return 0


class Logger(Protocol):
    """What `Announcer` needs of a logger: those of `logging` and those of Transformers have it."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None: ...


class Announcer:
    """Logs on the main process alone.

    Args:
        group: the processes.
        logger: of the module whose messages these are.

    Attributes:
        raises: types of errors that `failure` raises in place of logging them. Empty for users; the tests of this
            package list what only a bug raises.
    """

    raises: ClassVar[tuple[type[Exception], ...]] = ()

    def __init__(self, group: Group, logger: Logger):
        self.group, self.logger = group, logger
        self._messages: set[str] = set()

    def warning(self, message: str) -> None:
        """Logs at the default level, which users see."""
        self._log(logging.WARNING, message)

    def warning_once(self, message: str) -> None:
        """Logs a message the first time it is given."""
        if message not in self._messages:
            self._messages.add(message)
            self.warning(message)

    def info(self, message: str) -> None:
        """Logs for users who have asked for more."""
        self._log(logging.INFO, message)

    def failure(self, message: str, error: Exception) -> None:
        """Logs an error that the training survives: its type and message for users, the traceback at debug level.

        Args:
            message: what does not happen now, without a full stop.
            error: why.
        """
        self.trace(self.logger, message, error)
        self.warning(f"{message}: {describe_error(error)}")

    @classmethod
    def survived(cls, logger: Any, message: str, error: Exception) -> None:
        """Logs an error of the user's own code for which another way is tried: its type and message, at info level.

        Its traceback follows at debug level.

        Args:
            logger: of the module that tries another way.
            message: what does not work, without a full stop.
            error: why.
        """
        logger.info(f"{message}: {describe_error(error)}")
        logger.debug(message, exc_info=error)

    @classmethod
    def trace(cls, logger: Any, message: str, error: Exception) -> None:
        """Logs the traceback of an error that the training survives, at debug level and on the process that has it.

        Args:
            logger: of the module that survives it.
            message: what does not happen now, without a full stop.
            error: why.

        Raises:
            Exception: the error itself, if it is one of `raises`.
        """
        if isinstance(error, cls.raises):
            raise error
        logger.debug(message, exc_info=error)

    def _log(self, level: int, message: str, **settings: Any) -> None:
        if self.group.is_main:
            listener = _LISTENER.get()
            if listener is not None and level >= logging.WARNING:
                listener(message)
            # Where a bar is drawn, it goes away for the line and comes back below it, as `tqdm.write` does.
            with tqdm.external_write_mode(file=sys.stderr):
                self.logger.log(level, message, **settings)


@contextlib.contextmanager
def hearing(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside, a listener is told every message that users see."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def describe_error(error: BaseException) -> str:
    """An error's message with the name of its type: a bug of this package must not look like a full disk."""
    return f"{error} ({type(error).__name__})"


def _pickled(error: Exception) -> bytes:
    """The error as bytes that every process can read."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # an error class of somebody else that does not survive: its kind, name and message do
        # The kind too: processes that handle one failure differently would wait for each other.
        kind = next((kind for kind in (OSError, ValueError) if isinstance(error, kind)), RuntimeError)
        return pickle.dumps(kind(describe_error(error)))
    return pickled


def _name_process(error: Exception, rank: int) -> Exception:
    if isinstance(error, OSError) and error.strerror is not None:
        error.strerror = f"process {rank}: {error.strerror}"
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"process {rank}: {error.args[0]}", *error.args[1:])
    return error


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel wrapper of a model; None if it has none."""
    model = getattr(model, "_orig_mod", model)  # accelerate compiles around the wrapper
    return model if isinstance(model, DistributedDataParallel) else None


def rewrap_ddp(model: nn.Module) -> None:
    """Makes a DistributedDataParallel wrapper forget parameters that no longer need a gradient.

    Its reducer is set up once and waits for the gradient of every parameter that was trainable then. `Trainer` holds
    the wrapper in a local variable, so it cannot be exchanged: it takes over the state of a fresh one, with the same
    settings, and the old reducer goes with its hooks.
    """
    found = find_ddp(model)
    if found is None or not any(p.requires_grad for p in found.module.parameters()):
        return
    model = found
    for parameter in model.module.parameters():
        parameter.grad = None  # a gradient may be a view into a bucket of the old reducer
    buffer_sync: dict[str, Any] = {_BUFFER_SYNC: model.broadcast_buffers}
    fresh = DistributedDataParallel(
        model.module,
        device_ids=model.device_ids,
        output_device=model.output_device,
        dim=model.dim,
        process_group=model.process_group,
        bucket_cap_mb=model.bucket_bytes_cap / 2**20,
        find_unused_parameters=model.find_unused_parameters,
        gradient_as_bucket_view=model.gradient_as_bucket_view,
        static_graph=model.static_graph,
        **buffer_sync,
    )
    training = model.training
    model.__dict__.update(fresh.__dict__)  # attributes that accelerate has set beside its own stay
    model.training = training


@contextlib.contextmanager
def without_buffer_sync(model: nn.Module) -> Iterator[None]:
    """Inside, a forward pass of a wrapped model waits for no other process."""
    ddp = find_ddp(model)
    if ddp is None:
        yield
        return
    before = ddp.broadcast_buffers
    ddp.broadcast_buffers = False
    try:
        yield
    finally:
        ddp.broadcast_buffers = before
