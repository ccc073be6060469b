"""Packed rows: the training on plain ones, bit for bit, wherever it is resumed."""

import shutil

import pytest
from support.helpers import assert_same_weights, losses, weights
from support.packed_stores import DATA, assert_same_rows, stores_in, train_on_rows


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("plain", {}),
        ("plain", dict(dataloader_num_workers=2, codec="int8")),
        ("plain", dict(points="1:2,2:3", deepen="cache", codec="fp16")),
        ("plain", dict(materialize="write_through")),
        ("sensitive", dict(views=2)),
        ("sensitive", dict(materialize="write_through", num_train_epochs=5)),
        ("whole", dict(views=2, codec="mixed@3")),
    ],
)
def test_training_on_packed_rows_is_the_same_bit_for_bit(data, settings, tmp_path):
    plain, packed = (
        train_on_rows(tmp_path / name, name == "packed", DATA[data](), **settings) for name in ("plain", "packed")
    )
    assert plain.freeze_status().replaying and packed.freeze_status().replaying
    assert losses(plain) == losses(packed)
    assert_same_weights(weights(plain), weights(packed))
    first, second = (stores_in(tmp_path / name) for name in ("plain", "packed"))
    assert first.keys() == second.keys() and all(store.manifest.lossless for store in second.values())
    for cut, store in first.items():
        assert store.path.name != second[cut].path.name
        assert_same_rows(store, second[cut], 32)
        kept = second[cut].frame_bytes()
        assert kept.keys() == {"base", *(f"view_{view}" for view in range(1, store.manifest.views + 1))}


@pytest.mark.parametrize("step", [4, 12])
def test_resumed_training_equals_the_uninterrupted_one(step, tmp_path):
    data = DATA["sensitive"]
    whole = train_on_rows(tmp_path / "whole", True, data(), save_strategy="epoch")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", ignore=shutil.ignore_patterns("_freeze_cache"))
    checkpoint = tmp_path / "resumed" / f"checkpoint-{step}"
    resumed = train_on_rows(tmp_path / "resumed", True, data(), resume=str(checkpoint), save_strategy="epoch")
    assert losses(whole) == losses(resumed)
    assert_same_weights(weights(whole), weights(resumed))
