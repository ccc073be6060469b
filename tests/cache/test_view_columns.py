"""Columns of augmented views in a store."""

import numpy as np
import torch
from support.images import picture_dataset, replayable
from support.view_trainings import train


def test_columns_of_views(tmp_path):
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=2, sensitive_fraction=0.25)
    names = {"base", "special", "sample_id", "labels"}
    for view in (1, 2):
        names |= {f"view_{view}", f"view_special_{view}", f"geometry_{view}"}
    assert set(store.dataset.column_names) == names
    # 8 of 32 channels of 16 tokens at 4 bits; 32 half floats; 8 floats.
    assert store.dataset.features["view_1"].length == 8 * 16 // 2
    assert store.dataset.features["view_special_1"].length == 64
    assert store.dataset.features["geometry_1"].length == 8
    assert len(store.manifest.sensitive_channels) == 8


def test_labels_that_a_collator_draws_go_with_their_draw(tmp_path):
    """A collator that mixes labels: each stored draw keeps its own."""

    def drawing_labels(samples):
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "labels": torch.tensor([sample["labels"] for sample in samples]),
            "weight": torch.rand(len(samples)),
            "names": [f"{sample['labels']}-{int(torch.randint(9, ()))}" for sample in samples],
        }

    trainer, store = train(
        picture_dataset().with_transform(replayable()), tmp_path, data_collator=drawing_labels, views=1
    )
    source = trainer._session.source
    for view in (0, 1):
        for batch in range(source.num_ranges):
            rows = source.rows(batch)
            read, drawn = store.read_rows(rows, np.full(len(rows), view)), source.collate(rows, view)
            assert torch.equal(read["weight"], drawn["weight"]) and read["names"] == drawn["names"]
