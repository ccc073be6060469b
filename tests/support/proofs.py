"""The proof of a chain at every cut: what a step gives on features is what it gives with a frozen prefix."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_freezecache import BlockChain
from hf_freezecache.model.record import answers_of


class UnrepeatableError(Exception):
    """The same step from the same generators gives another loss: a training's rehearsal refuses to cache."""


def spread_cuts(chain: BlockChain, most: int) -> list[int]:
    """Some cuts of a chain, the first and the last among them."""
    cuts = range(1, len(chain) + 1)
    if len(cuts) <= most:
        return list(cuts)
    return sorted({cuts[number * (len(cuts) - 1) // (most - 1)] for number in range(most)})


def assert_outputs_equal(chain: BlockChain, batch: Mapping[str, Any], cuts: Sequence[int]) -> None:
    """Loss and logits of prefix and suffix are those of the model, bit for bit."""
    with torch.no_grad():
        expected = answers_of(chain.model(**batch))
        for cut in cuts:
            replayed = answers_of(chain.suffix(chain.prefix(batch, cut), batch, cut))
            assert replayed.keys() == expected.keys(), f"cut {cut}"
            for path, value in expected.items():
                assert torch.equal(replayed[path], value), f"cut {cut}: {path}"


def assert_steps_equal(chain: BlockChain, batch: Mapping[str, Any], cuts: Sequence[int]) -> None:
    """Loss, gradients and buffers of a training step on features are those of the step with a frozen prefix."""
    for cut in cuts:
        chain.freeze(cut)
        live, replayed = _step(chain, batch, None), _step(chain, batch, chain.prefix(batch, cut))
        if not torch.equal(live[0], replayed[0]) and not torch.equal(live[0], _step(chain, batch, None)[0]):
            raise UnrepeatableError("a step of the model does not repeat itself")
        assert torch.equal(live[0], replayed[0]), f"cut {cut}: losses {live[0]:.9f} and {replayed[0]:.9f}"
        different = [
            name
            for name in live[1].keys() | replayed[1].keys()
            if name not in live[1]
            or name not in replayed[1]
            or not torch.equal(live[1][name].nan_to_num(7), replayed[1][name].nan_to_num(7))
        ]
        assert not different, f"cut {cut}: other gradients of {different[:3]}"


def _step(
    chain: BlockChain, batch: Mapping[str, Any], features: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = chain.model
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    chain.eval_prefix()
    model.zero_grad(set_to_none=True)
    inputs = dict(batch)
    replay: Any = contextlib.nullcontext()
    if features is not None:
        inputs[chain.main_input] = chain.input_of_replay(features, batch)
        replay = chain.replay(chain.cut, features, inputs[chain.main_input])
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    with replay, chain.frozen_modes():
        answers = answers_of(model(**inputs))
        loss = answers.get(("loss",))
        if loss is None:
            loss = sum(value.float().square().mean() for value in answers.values())
        if loss.requires_grad:
            loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name in buffers and value.shape == buffers[name].shape:
                value.copy_(buffers[name])
    return loss.detach(), gradients
