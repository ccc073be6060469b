"""More seeds for one paired difference: cached minus freeze-only at one schedule, accuracy only.

python -m benchmarks.finetune_caltech.more_pairs --schedules 2:10 --seeds 5,6,7

Accuracy does not depend on the machine's load, so seeds may run side by side with anything. Of the plain arm only the
live epochs that a pair shares are trained. Needs the experiment's `result.json`, with which the pairs are pooled.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch

from .._common import REPOSITORY, describe_machine, prepare, quiet, write_json
from .._statistics import paired
from .arms import PLAIN, Arm, Data, cached, freeze_only, train_arm
from .run import parse_options

FOLDER = REPOSITORY / "benchmarks" / "finetune_caltech"


def train_pair(seed: int, schedule: str, data: Data, options) -> dict[str, float]:
    """Final test accuracies of one seed's two arms, from the same checkpoint."""
    branch = int(schedule.split(":")[0])
    folder = Path(tempfile.mkdtemp())
    try:
        plain = train_arm(Arm(PLAIN), seed, data, folder, None, options, stop_after=branch)
        arms = Arm(freeze_only(schedule), schedule, "never", branch), Arm(cached(schedule), schedule, "always", branch)
        frozen, replayed = (train_arm(arm, seed, data, folder, plain, options)["accuracy"] for arm in arms)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"seed {seed}: freeze-only {100 * frozen:.2f} %, cached {100 * replayed:.2f} %", flush=True)
    return {"freeze_only": frozen, "cached": replayed}


def main() -> None:
    options = parse_options()
    (schedule,) = options.schedules
    prepare(options)
    quiet()
    torch.set_num_threads(options.threads)
    data = Data.load(options)
    target = FOLDER / f"more_pairs_{schedule.replace(':', '-')}.json"
    for seed in options.seeds:
        pair = train_pair(seed, schedule, data, options)
        pairs = json.loads(target.read_text())["pairs"] if target.exists() else {}
        pairs[str(seed)] = pair
        result = json.loads((FOLDER / "result.json").read_text())
        first_differences = result["results"]["schedules"][schedule]["cached_minus_freeze_only_points"]["by_seed"]
        more_differences = [100 * (pair["cached"] - pair["freeze_only"]) for pair in pairs.values()]
        write_json(
            target,
            {
                "schedule": schedule,
                "pairs": pairs,
                "planned_seeds": paired(first_differences),
                "all_seeds": paired([*first_differences, *more_differences]),
                "machine": describe_machine(),
            },
        )


if __name__ == "__main__":
    main()
