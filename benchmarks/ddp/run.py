"""What `DistributedDataParallel` sends after a freeze, and what a step takes: wrapped once, and wrapped again.

python -m benchmarks.ddp.run --threads 1
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_freezecache import BlockChain
from hf_freezecache.distributed import rewrap_ddp

from .._common import Claim, make_parser, pick, prepare, quiet, write_result

#: How the wrapper learns of the frozen parameters.
SIDES = ("wrapped once", "wrapped again")


def make_model(name: str, options: argparse.Namespace) -> torch.nn.Module:
    """A model of usual proportions with weights of its initialization: what is sent does not depend on them."""
    torch.manual_seed(options.seed)
    if name == "ViT":
        size = dict(hidden_size=options.width, intermediate_size=4 * options.width, image_size=options.image_size)
        return ViTForImageClassification(
            ViTConfig(**size, num_hidden_layers=12, num_attention_heads=3, patch_size=16, num_labels=100)
        )
    sizes = [options.width // 4 * 2**stage for stage in range(4)]
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=sizes[0], hidden_sizes=sizes, depths=[2] * 4, layer_type="basic", num_labels=100)
    )


class Side:
    """A frozen model in its wrapper, trained on features or on images.

    Args:
        model: not wrapped; copied.
        batch: model inputs.
        share: of the blocks, that are frozen.
        again: whether the model is wrapped again after the freeze.
    """

    def __init__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], share: float, again: bool):
        own = copy.deepcopy(model)
        self.chain, self.batch, self.bytes = BlockChain.from_model(own, probe=batch), batch, 0
        self.cut = round(share * len(self.chain))
        # What `Trainer` asks for; without it, a wrapper waits for gradients that do not come.
        self.model = DistributedDataParallel(own, find_unused_parameters=True)
        self.features = self.chain.prefix(batch, self.cut)
        self.chain.freeze(self.cut)
        begin = time.perf_counter()
        if again:
            rewrap_ddp(self.model)
        self.wrap_seconds = time.perf_counter() - begin
        trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-4)

    def step(self, replays: bool) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        if replays:
            inputs = self.chain.input_of_replay(self.features, self.batch)
            with self.chain.replay(self.cut, self.features, inputs):
                loss = self.model(**{**self.batch, self.chain.main_input: inputs}).loss
        else:
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()

    def count_bytes(self) -> int:
        """Bytes of gradients that a step gives to `all_reduce`. The counting stays in the wrapper: call it last."""
        sent = [0]

        def count(state, bucket):  # PyTorch compares annotations with its own types
            sent[0] += bucket.buffer().numel() * bucket.buffer().element_size()
            return allreduce_hook(state, bucket)

        self.model.register_comm_hook(None, count)
        self.step(replays=True)
        return sent[0]


def measure(rank: int, processes: int, options: argparse.Namespace, folder: str) -> None:
    """The work of one process; the first writes what it has measured."""
    torch.set_num_threads(options.threads or 1)
    quiet()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(f"{folder}/store-{processes}", processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    found: dict[str, Any] = {}
    for name in options.models:
        model = make_model(name, options)
        torch.manual_seed(options.seed + rank)
        pixels = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
        batch = {"pixel_values": pixels, "labels": torch.randint(0, 100, (options.batch_size,))}
        sides = {side: Side(model, batch, options.frozen, side == SIDES[1]) for side in SIDES}
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trained_parameters": sum(p.numel() for p in sides[SIDES[0]].model.parameters() if p.requires_grad),
            "cut": sides[SIDES[0]].cut,
            "blocks": len(sides[SIDES[0]].chain),
            "wrap_seconds": sides[SIDES[1]].wrap_seconds,
            "replay_seconds": _time(sides, options, replays=True),
            "frozen_seconds": _time(sides, options, replays=False),
            "bytes": {side: each.count_bytes() for side, each in sides.items()},
        }
    if rank == 0:
        Path(f"{folder}/{processes}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def _time(sides: dict[str, Side], options: argparse.Namespace, replays: bool) -> dict[str, float]:
    """Median seconds of a step on each side, in turn: all processes in the same order."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.repeats + 2):
        for side in SIDES[:: 1 if number % 2 else -1]:
            torch.distributed.barrier()
            begin = time.perf_counter()
            sides[side].step(replays)
            if number > 1:
                seconds[side].append(time.perf_counter() - begin)
    return {side: statistics.median(each) for side, each in seconds.items()}


def run_in_processes(work: Callable[..., None], processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """What the first of some processes has measured."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (processes, options, folder), nprocs=processes)
        return json.loads(Path(f"{folder}/{processes}.json").read_text())


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", default=["ViT", "ResNet"], choices=["ViT", "ResNet"])
    parser.add_argument("--batch_size", type=int, default=8, help="of a process")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--width", type=int, default=192, help="of a token; a ResNet's stages have 48 to 384 channels")
    parser.add_argument("--frozen", type=float, default=0.75, help="share of the blocks")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if options.smoke:
        options.processes, options.width, options.repeats, options.image_size = [2], 48, 2, 32
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    results = {str(processes): run_in_processes(measure, processes, options) for processes in options.processes}
    once, again = SIDES
    claims = []
    for processes, by_model in results.items():
        for name, found in by_model.items():
            where, trained = f"{name}, {processes} processes", 4 * found["trained_parameters"]
            claims += [
                Claim(f"{where}: bytes sent, wrapped again, relative to the trained parameters'", ratio, at_most=1.01)
                for ratio in [found["bytes"][again] / trained]
            ]
            for kind in ("replay", "frozen"):
                seconds = found[f"{kind}_seconds"]
                ratio = seconds[again] / seconds[once]
                claims.append(Claim(f"{where}: {kind} step, wrapped again relative to once", ratio, at_most=1.0))
    settings = pick(options, "processes models batch_size image_size width frozen repeats")
    write_result("ddp", options, settings, results, claims)


if __name__ == "__main__":
    main()
