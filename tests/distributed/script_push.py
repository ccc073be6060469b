"""Trains in one of several processes with `push_head_only`, and pushes to the server that a test runs."""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from support.heads import load_base, logits  # noqa: E402
from support.helpers import manual, pixel_dataset, run  # noqa: E402
from support.hub_server import WRITER, point_client_to  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--hub", required=True)
    options = parser.parse_args()
    point_client_to(options.hub, options.output / "hub-cache")
    os.environ["HF_TOKEN"] = WRITER
    trainer = run(
        load_base(options.base),
        pixel_dataset(32, 32),
        options.output / "run",
        manual("1:3", push_head_only=True, feature_cache_dir=str(options.output / "run/features")),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        push_to_hub=True,
        hub_model_id="ann/head",
        hub_strategy="end",
        ddp_timeout=60,
    )
    commit = trainer.push_to_hub()
    assert (commit is None) == (trainer.accelerator.process_index > 0)
    torch.save(logits(trainer.model), options.output / f"logits-{trainer.accelerator.process_index}.pt")
    trainer.accelerator.end_training()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of libraries still abort the interpreter's own end now and then


if __name__ == "__main__":
    main()
