"""The processes of a training: who decides, who agrees, and how DistributedDataParallel learns of a freeze."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Renamed by PyTorch; the attribute kept the old name.
_BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


@dataclass(frozen=True)
class Group:
    """The processes that train together; small objects only pass between them, never features."""

    rank: int = 0
    size: int = 1

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        broadcast_object_list(box, from_process=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process."""
        if self.size == 1:
            return [value]
        return gather_object([value])

    def on_all(self, step: Callable[[], Any]) -> Any:
        """Runs a step on every process; if it fails on one, it fails on all.

        Returns:
            This process's own result.

        Raises:
            Exception: the process's own; OSError, ValueError or RuntimeError if another one failed.
        """
        result, own = None, None
        try:
            result = step()
        except Exception as error:  # shared first, so that no process waits for one that is gone
            own = error
        failures = self.gather(None if own is None else (_kind(own).__name__, str(own)))
        if own is not None:
            raise own
        for rank, failure in enumerate(failures):
            if failure is not None:
                kind, message = failure
                raise _KINDS[kind](f"process {rank}: {message}")
        return result

    def together(self, step: Callable[[], Any]) -> list[Any]:
        """As `on_all`, but returns every process's result, by rank."""
        return self.gather(self.on_all(step))

    def on_main(self, step: Callable[[], Any]) -> Any:
        """Runs a step on the main process; its result, or its failure, is everybody's."""
        return self.broadcast(self.on_all(lambda: step() if self.rank == 0 else None))

    def share(self, batches: int) -> range:
        """The contiguous range of `batches` that is this process's part."""
        return range(batches * self.rank // self.size, batches * (self.rank + 1) // self.size)

    def broadcast_tensors(self, tensors: list[torch.Tensor]) -> None:
        """Overwrites the tensors with those of the main process, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)


_KINDS = {"OSError": OSError, "ValueError": ValueError, "RuntimeError": RuntimeError}


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in (OSError, ValueError) if isinstance(error, kind)), RuntimeError)


def rewrap_ddp(model: nn.Module) -> None:
    """Makes a DistributedDataParallel wrapper forget parameters that no longer need a gradient.

    Its reducer is set up once and waits for the gradient of every parameter that was trainable then. `Trainer` holds
    the wrapper in a local variable, so it cannot be exchanged: it takes over the state of a fresh one, with the same
    settings, and the old reducer goes with its hooks.
    """
    model = getattr(model, "_orig_mod", model)  # accelerate compiles around the wrapper
    if not isinstance(model, DistributedDataParallel) or not any(p.requires_grad for p in model.module.parameters()):
        return
    for parameter in model.module.parameters():
        parameter.grad = None  # a gradient may be a view into a bucket of the old reducer
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
        **{_BUFFER_SYNC: model.broadcast_buffers},
    )
    training = model.training
    model.__dict__.update(fresh.__dict__)  # attributes that accelerate has set beside its own stay
    model.training = training
