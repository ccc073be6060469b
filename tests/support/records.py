"""A small record of a training."""

from hf_freezecache.reporting.run_record import RunRecord

PHASE = {
    "cut": 2,
    "mode": "replay",
    "epochs": 1,
    "steps": 4,
    "seconds": 1.5,
    "flops": 2e9,
    "store_bytes": 100,
    "peak_memory_bytes": 5,
}


def make_record(**changes):
    fields = dict(
        run={"name": "first", "model": "ViT", "settings": {"codec": "'fp32'"}, "versions": {"torch": "2"}},
        blocks=["stem", "one", "two"],
        epochs=[
            {"epoch": 0, "cut": 0, "mode": "live", "begin": 0.0, "end": 2.0, "steps": 4, "store_bytes": 0},
            {"epoch": 1, "cut": 2, "mode": "replay", "begin": 2.5, "end": 3.0, "steps": 4, "store_bytes": 100},
        ],
        logs=[
            {"loss": 2.0, "seconds": 1.0, "epoch": 0.5, "step": 2},
            {"eval_loss": 1.5, "eval_accuracy": 0.5, "eval_runtime": 0.1, "seconds": 2.1, "epoch": 1.0, "step": 4},
            {"loss": 1.0, "seconds": 2.8, "epoch": 1.5, "step": 6},
        ],
        notes=[{"seconds": 2.2, "epoch": 0, "text": "Built the store."}],
        phases=[{**PHASE, "cut": 0, "mode": "live", "seconds": 2.0}, PHASE],
        totals={"seconds": 3.5, "train_seconds": 3.5, "build_seconds": 0.0, "flops": 4e9, "peak_memory_bytes": 5},
        plain_estimate={"seconds": 4.0, "flops": 8e9},
        store={"codec": "fp32", "Arrow files, bytes": 100},
    )
    return RunRecord(**{**fields, **changes})
