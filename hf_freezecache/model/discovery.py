"""The blocks of a model that nobody has declared, found in a recorded run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from .blocks import Block
from .boundaries import Flow
from .errors import ChainError
from .record import Call

#: What takes a smaller share of a run's FLOPs is no block of its own.
_SMALL = 0.005
#: Tensors that may pass between elements of a series.
MOST_TENSORS = 3
#: What takes a larger share is looked into even if what it calls is not a series of the same kind.
_LARGE = 0.25


def discover_blocks(flow: Flow) -> list[Block]:
    """Finds parts of a model that run one after the other, between which a single tensor passes.

    Several tensors may pass between the elements of a series that is a large part of the model and cannot be cut
    otherwise: the layers of a decoder, which get what the encoder has made as well.

    The parts are elements of series (a stack of layers, the blocks of a stage), as far down as the model can be cut
    between them, and what runs before and between these. What takes next to nothing (normalization, activation,
    pooling) belongs to the part before it, and at the end to the head.

    Args:
        flow: the recorded run of the model.

    Raises:
        ChainError: if the model cannot be cut anywhere; the message names what crosses at the likeliest places.
    """
    units = list(_units(flow, flow.record.calls[0]))
    blocks: list[list[Call]] = []
    gathered: list[Call] = []
    done = 0.0
    for unit, most in units:
        gathered.append(unit)
        boundary = flow.behind(unit, most=most)
        if boundary.why_not is not None or boundary.shared or not boundary.has_parameters_behind:
            continue
        if not flow.runs_once(unit.module):
            continue
        if boundary.flops - done >= _SMALL or not blocks and any(map(_has_parameters, gathered)):
            blocks.append(gathered)
        elif blocks and 1.0 - boundary.flops >= _SMALL:
            blocks[-1] += gathered
        else:
            continue
        gathered, done = [], boundary.flops
    if not blocks:
        raise ChainError(_explain(flow, [unit for unit, _ in units]))
    return [_make(flow, block) for block in _joined(flow, blocks)]


def _joined(flow: Flow, blocks: list[list[Call]]) -> list[list[Call]]:
    """The blocks, those joined between which a replay would begin with parameters that both sides read.

    A replay begins at the first module of the next block if it can. What runs between the blocks is frozen then as
    well, and it may use what a later block uses.
    """
    joined = blocks[:1]
    for block in blocks[1:]:
        first = next((unit for unit in block if flow.runs_once(unit.module)), block[-1])
        if flow.behind(joined[-1][-1], first, MOST_TENSORS).shared:
            joined[-1] = joined[-1] + block
        else:
            joined.append(block)
    return joined


def _units(flow: Flow, call: Call) -> Iterator[tuple[Call, int]]:
    """The calls within a call, those that can be cut inside replaced by what is within them.

    Each comes with the number of tensors that may pass behind it.
    """
    series = _series_of_several(flow, call)
    for child in call.children:
        if flow.is_changing(child):
            if child not in series and (_is_divided(flow, child) or _holds_series(flow, child)):
                yield from _units(flow, child)
            else:
                yield child, MOST_TENSORS if child in series else 1


def _is_divided(flow: Flow, call: Call) -> bool:
    """Whether a call is taken as what is within it: as a series of the same kind, or as it is large."""
    changing = [child for child in call.children if flow.is_changing(child)]
    ends = [child for child in changing[:-1] if flow.runs_once(child.module) and flow.behind(child).why_not is None]
    kinds = Counter(type(child.module) for child in changing)
    if any(
        kinds[type(child.module)] > 1 and not type(child.module).__module__.startswith("torch.nn") for child in ends
    ):
        return True
    if flow.share(call) < _LARGE:
        return False
    return bool(ends) or any(_is_divided(flow, child) for child in changing)


def _series_of_several(flow: Flow, call: Call) -> set[Call]:
    """The elements of a large series within a call between which several tensors pass, but few."""
    changing = [child for child in call.children if flow.is_changing(child)]
    elements: set[Call] = set()
    for kind, count in Counter(type(child.module) for child in changing).items():
        series = [child for child in changing if type(child.module) is kind]
        is_own = not kind.__module__.startswith("torch.nn")
        if count < 2 or not is_own or sum(map(flow.share, series)) < _LARGE:
            continue
        if any(flow.behind(element).why_not is not None for element in series[:-1]) and all(
            flow.runs_once(element.module) and flow.behind(element, most=MOST_TENSORS).why_not is None
            for element in series[:-1]
        ):
            elements |= set(series)
    return elements


def _holds_series(flow: Flow, call: Call) -> bool:
    if flow.share(call) < _LARGE:
        return False
    return bool(_series_of_several(flow, call)) or any(_holds_series(flow, child) for child in call.children)


def _has_parameters(call: Call) -> bool:
    return any(True for _ in call.module.parameters())


def _make(flow: Flow, units: list[Call]) -> Block:
    named = next((unit for unit in units if _has_parameters(unit)), units[0])
    modules: list[nn.Module] = [unit.module for unit in units if flow.runs_once(unit.module)]
    return Block(named.name, tuple(modules))


def _explain(flow: Flow, units: list[Call]) -> str:
    reasons, work = [], list(units)
    while work:
        unit = work.pop(0)
        boundary = flow.behind(unit)
        if boundary.why_not is not None:
            reasons.append(f"after '{unit.name}' {boundary.why_not}")
        elif boundary.shared:
            reasons.append(f"'{boundary.shared[0]}' is used up to '{unit.name}' and behind it")
        elif not boundary.has_parameters_behind:  # all of the model: what is within it?
            work = [*(child for child in unit.children if flow.is_changing(child)), *work]
    told = "; ".join(dict.fromkeys(reasons[:3])) or "no part of it answers with one tensor that depends on the samples"
    return (
        f"{type(flow.model).__name__} cannot be cut anywhere that was tried: {told}. Name blocks yourself, stem "
        "first: blocks=['stem', 'layer1.0', ...]."
    )
