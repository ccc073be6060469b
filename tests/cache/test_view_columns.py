"""Columns of augmented views in a store."""

import numpy as np
import pytest
import torch
from support.codec_cases import MAP, NAMES, TOKENS, smooth
from support.images import picture_dataset, replayable
from support.sessions import rows_of
from support.view_trainings import train

from hf_freezecache.augment.geometry import PROJECTIVE, geometry_column
from hf_freezecache.cache.codec import make_codec
from hf_freezecache.cache.view_columns import ViewColumns, ViewSpec


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
    source = rows_of(trainer)
    for view in (0, 1):
        for batch in range(source.num_ranges):
            rows = source.rows(batch)
            read, drawn = store.read_rows(rows, np.full(len(rows), view)), source.collate(rows, view)
            assert torch.equal(read["weight"], drawn["weight"]) and read["names"] == drawn["names"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [MAP, TOKENS])
def test_views_of_every_codec_have_their_planned_size(layout, name):
    """Before the codec is fitted, a build's bytes are estimated from its views' columns."""
    channels = torch.tensor([0, 3, 4])
    spec = ViewSpec(1, PROJECTIVE, channels=channels, outside=torch.zeros(6))
    x, geometry = smooth(layout), torch.zeros(12, geometry_column(PROJECTIVE, layout.grid)[1])
    planned = ViewColumns(spec, make_codec(name, layout)).columns
    views = ViewColumns(spec, make_codec(name, layout).fit(x))
    rows = views.encode(1, x, geometry, range(12))
    assert views.columns == planned
    assert {key: row.shape[1] for key, row in rows.items()} == {key: length for key, (_, length) in planned.items()}
    back = views.decode({key.removesuffix("_1"): row for key, row in rows.items()})
    true = layout.body(x).index_select(layout.channel_dim + 1, channels)
    assert back["view"].shape == true.shape
    assert (back["view"] - true).square().mean() < 0.2 * true.var()
    assert ("view_special" in back) == (layout is TOKENS)
