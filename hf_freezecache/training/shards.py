"""A model that FSDP2 has split: whole in every process for a while, and bypassed blocks gather nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..distributed import Group
from ..model.chain import BlockChain
from ..model.stand_ins import FrozenOutputError
from ..units import show_bytes
from .proof import MismatchError
from .sharding import free_memory, sharded_modules

#: Where the functions come from that FSDP2 has a module call before and after its forward pass.
_FSDP = "torch.distributed.fsdp"


class Shards:
    """What FSDP2 has split of a model; nothing of any other.

    FSDP2 has every module that it wraps gather its weights from all processes before its forward pass, and give them
    up after it. A process that runs such a module waits for all others to run it, too. So what one process runs more
    often than another (a build, a proof, a measurement) runs on `whole` weights; and steps on features run
    `leaving_out` the frozen modules, which gather nothing then.

    Args:
        chain: the model, which is split later.
        is_split: whether it will be.
        group: the processes.
        decline: is told why nothing is cached, where the model cannot be made whole.
    """

    def __init__(self, chain: BlockChain, is_split: bool, group: Group, decline: Callable[[str], None]):
        self.is_split, self._group, self._decline = is_split, group, decline
        self._chain, self._is_whole = chain, False
        self._modules: list[Any] = []
        self._taken: dict[str, torch.Tensor] = {}
        self._frozen: tuple[int, list[nn.Module]] = (0, [])

    def _why_not_whole(self) -> str | None:
        for module in self._modules:
            if not _own_hooks(module._forward_pre_hooks) or not _own_hooks(module._forward_hooks):
                return f"FSDP2 of PyTorch {torch.__version__} gathers weights in a way that is not known."
        parameters = list(self._chain.model.parameters())
        needed = sum(each.numel() * each.element_size() for each in parameters)
        free = free_memory(parameters[0].device)
        if not any(self._group.gather(free is not None and free < needed)):
            return None
        return (
            f"a store is made with whole weights, {show_bytes(needed)} on every process, and one has less memory free."
        )

    @contextlib.contextmanager
    def whole(self, wanted: bool = True) -> Iterator[bool]:
        """Inside, every process has all weights, in the precision of the steps, and runs the model alone.

        All processes enter and leave it together: they gather the weights at its beginning.

        Args:
            wanted: whether anything is to run so.

        Yields:
            Whether the model is whole now: not where there is no room for that.
        """
        if not wanted or not self.is_split or self._is_whole:
            yield wanted
            return
        self._modules = sharded_modules(self._chain.model)
        if (why := self._why_not_whole()) is not None:
            self._decline(why)
            yield False
            return
        self._is_whole, self._taken = True, {}
        try:
            for module in self._modules:
                module.reshard()  # an evaluation leaves some gathered
                module.unshard()
            with contextlib.ExitStack() as stack:
                for module in self._modules:
                    stack.enter_context(_instead(module, *_casts(module)))
                yield True
        finally:
            self._is_whole = False
            for module in self._modules:
                module.reshard()
        self._write_back()

    def take_over(self, names: Collection[str]) -> None:
        """Inside `whole`: what has become of some parameters stays, in the shards as well.

        Args:
            names: of parameters that are the same on all processes.
        """
        if self._is_whole:
            parameters = self._chain.model.named_parameters()
            self._taken = {name: value.detach().clone() for name, value in parameters if name in names}

    def _write_back(self) -> None:
        from torch.distributed.tensor import DTensor, Replicate

        taken, self._taken = self._taken, {}
        for name, shard in self._chain.model.named_parameters():
            if name in taken:
                mesh = shard.device_mesh  # type: ignore[attr-defined]  # a DTensor now
                whole = DTensor.from_local(taken[name], mesh, [Replicate()] * mesh.ndim, run_check=False)
                with torch.no_grad():
                    shard.copy_(whole.redistribute(placements=shard.placements))  # type: ignore[attr-defined]

    def check_repeatable(self, error: FrozenOutputError) -> None:
        """Whether a step may be run again on samples, after it has failed on features.

        Args:
            error: what has ended it, in the middle of a forward pass that other processes may go on with.

        Raises:
            MismatchError: if the model is split.
        """
        if self.is_split:
            raise MismatchError(f"{error} This step cannot be run again on samples: FSDP2 has begun it.") from error

    @contextlib.contextmanager
    def leaving_out(self, cut: int) -> Iterator[None]:
        """Inside, nothing is gathered for modules that do not run on features.

        Args:
            cut: frozen blocks that the step bypasses; 0: none.
        """
        if not cut or not self._modules or self._is_whole:
            yield
            return
        if self._frozen[0] != cut:
            self._frozen = cut, self._not_run(cut)
        with contextlib.ExitStack() as stack:
            for module in self._frozen[1]:
                stack.enter_context(_instead(module, _nothing, _nothing))
            yield

    def _not_run(self, cut: int) -> list[nn.Module]:
        """The modules that a step on features leaves out, with all that FSDP2 gathers together with them."""
        trace = self._chain.own_trace()
        skipped = trace.cut(cut).boundary.skipped
        live = trace.record.live_calls(skipped)
        left = {module for module in self._modules if set(live.get(module, ())) <= set(skipped)}
        return [module for module in self._modules if left.issuperset(module._get_fsdp_state()._modules)]


def _own_hooks(hooks: dict[int, Callable]) -> list[int]:
    """The keys of FSDP's own among the hooks of a module."""
    return [key for key, hook in hooks.items() if str(getattr(hook, "__module__", "")).startswith(_FSDP)]


@contextlib.contextmanager
def _instead(module: nn.Module, before: Callable, after: Callable) -> Iterator[None]:
    """Inside, a module calls these in the place of FSDP's hooks, before and after its forward pass."""
    replaced = [
        (hooks, key, hooks[key], other)
        for hooks, other in ((module._forward_pre_hooks, before), (module._forward_hooks, after))
        for key in _own_hooks(hooks)
    ]
    try:
        for hooks, key, _, other in replaced:
            hooks[key] = other
        yield
    finally:
        for hooks, key, own, _ in replaced:
            hooks[key] = own


def _casts(module: Any) -> tuple[Callable, Callable]:
    """What FSDP's hooks do besides gathering: they cast arguments and outputs, as its mixed precision says."""
    precision = module._get_fsdp_state()._mp_policy
    inputs, outputs = precision.param_dtype if precision.cast_forward_inputs else None, precision.output_dtype

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return _cast(args, inputs), _cast(kwargs, inputs)

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        return _cast(output, outputs)

    return before, after


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor

    return values if dtype is None else tree_map_only(torch.Tensor, cast, values)


def _nothing(*_: Any) -> None:
    """Does nothing, as a hook."""
