"""Samples of several sizes, found among those of a data set."""

import torch
from support.sized_images import SIZES, SizedImages
from support.token_rows import Pad, Texts
from transformers import default_data_collator

from hf_freezecache.build.padded_samples import has_widths
from hf_freezecache.build.several_sizes import one_of_each_size, rows_by_size, sized, use_common_size
from hf_freezecache.cache.rows import RowSource


def source(samples, batch_size=4, collator=default_data_collator):
    return RowSource(samples, collator, batch_size, 0)


def test_rows_are_found_by_their_size():
    images = SizedImages(24)
    found = rows_by_size(source(images), "pixel_values")
    assert [images.sizes[rows[0]] for rows in found] == sorted(SIZES, key=lambda size: size[0] * size[1])
    assert sorted(row for rows in found for row in rows) == list(range(24))
    assert all(len({images.sizes[row] for row in rows}) == 1 for rows in found)


def test_several_sizes_are_looked_for_once():
    class Counting(SizedImages):
        reads = 0

        def __getitem__(self, row):
            Counting.reads += 1
            return super().__getitem__(row)

    rows = source(Counting())
    first, reads = rows_by_size(rows, "pixel_values"), Counting.reads
    assert rows_by_size(rows, "pixel_values") is first and Counting.reads == reads <= 40


def test_samples_of_one_size_and_those_that_are_brought_to_one_have_none():
    def cut(samples):
        return default_data_collator([{"pixel_values": each["pixel_values"][:, :32, :32]} for each in samples])

    assert rows_by_size(source(SizedImages(sizes=SIZES[:1])), "pixel_values") == ()
    assert rows_by_size(source(SizedImages(), collator=cut), "pixel_values") == ()
    assert rows_by_size(source(Texts(16), collator=Pad()), "input_ids") == ()
    assert rows_by_size(source(Texts(16), 1, Pad()), "input_ids") == ()  # one text a batch: its mask tells all
    assert has_widths(source(Texts(16), collator=Pad()), "input_ids")
    assert has_widths(source(SizedImages()), "pixel_values")


def test_rows_of_the_most_common_size_stand_for_all():
    images = SizedImages(24, sizes=[SIZES[0], SIZES[1], SIZES[1]])
    rows = source(images)
    assert use_common_size(rows, "pixel_values")
    assert {images.sizes[row] for row in rows.probe_rows} == {SIZES[1]} and len(set(rows.probe_rows)) == 2
    assert rows.probe()["pixel_values"].shape == (2, 3, *SIZES[1])


def test_a_single_sample_is_repeated_where_batches_are_one_sample():
    def alone(samples):
        (sample,) = samples
        return {"pixel_values": sample["pixel_values"][None], "names": ["a"]}

    rows = source(SizedImages(), 1, alone)
    assert use_common_size(rows, "pixel_values")
    probe = rows.probe()
    assert torch.equal(*probe["pixel_values"]) and probe["names"] == ["a", "a"]


def test_batches_go_from_the_smallest_size_to_the_largest():
    rows = source(SizedImages())
    rows_by_size(rows, "pixel_values")
    shapes = [tuple(batch["pixel_values"].shape) for batch in one_of_each_size(rows)]
    assert shapes == [(4, 3, *size) for size in sorted(SIZES, key=lambda size: size[0] * size[1])]
    assert [tuple(batch["pixel_values"].shape[2:]) for batch in one_of_each_size(rows, 2)] == [(32, 32), (48, 48)]


def test_ranges_of_several_sizes_are_drawn_by_size():
    rows = source(SizedImages())
    own = sized(rows, "pixel_values", {"pixel_values"})
    assert sized(rows, "pixel_values", {"pixel_values"}) is own
    assert sized(rows, "pixel_values", {"labels"}).rule.read == {"pixel_values", "labels"}
    for number, (drawn,) in own.loader(range(own.num_ranges)):
        assert len(drawn.batch) == len(own.rows(number)) == 4
