"""Texts of several ranges run together, sorted by length."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.builds import make_text_spec, without_labels
from support.token_rows import Choices, Pad, PadChoices, Texts, bert, bert_of_choices, gpt2

from hf_freezecache.build.feature_sources import ImageFeatures
from hf_freezecache.build.materialize import ranges_together, run_views
from hf_freezecache.build.texts_by_length import batches_by_length, run_by_length

CUT = 2


class Lengthy(Pad):
    """Adds what a user's collator may add to a batch of texts.

    Args:
        side: of the padding.
        added: makes more entries of a batch.
    """

    def __init__(self, side="right", added=lambda batch: {}):
        super().__init__(side)
        self.added = added

    def __call__(self, samples):
        batch = super().__call__(samples)
        return {**batch, **self.added(batch)}


def spec_of(model, collator, tmp_path, rows=70, codec="int4"):
    texts = Choices(rows) if isinstance(collator, PadChoices) else Texts(rows, longest=30)
    return make_text_spec(model, tmp_path, texts, collator, CUT, codec)


def count_tokens(model, run):
    """What a run returns, and the numbers of texts and of positions of every batch that the model got for it."""
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].flatten(0, -2).shape)), with_kwargs=True
    )
    try:
        return list(run()), shapes
    finally:
        handle.remove()


def position_ids(batch):
    return {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


def token_types(batch):
    return {"token_type_ids": batch["attention_mask"] * (torch.arange(batch["input_ids"].shape[1]) % 2)}


@pytest.mark.parametrize(
    ("make", "collator"),
    [
        (bert, Lengthy()),
        (bert, Lengthy(added=token_types)),
        (bert, Lengthy(added=position_ids)),
        (gpt2, Lengthy("left", lambda batch: {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)})),
        (bert_of_choices, PadChoices()),
    ],
    ids=["right", "types of tokens", "positions for all", "left", "several texts a sample"],
)
def test_sorted_texts_have_the_same_features_with_less_padding(make, collator, tmp_path):
    model = make()
    spec = spec_of(model, collator, tmp_path)
    numbers = range(spec.source.num_ranges)
    alone, before = count_tokens(model, lambda: spec.feature_source.run(numbers))
    together, after = count_tokens(model, lambda: run_views(spec, numbers))
    assert [number for number, _ in together] == [number for number, _ in alone] == [*numbers]
    for (_, [one]), (_, [other]) in zip(alone, together, strict=True):
        torch.testing.assert_close(other.features, one.features, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.mask, other.mask) and one.constants == other.constants
        assert all(torch.equal(one.columns[name], other.columns[name]) for name in one.columns)
    padded = [sum(rows * width for rows, width in shapes) for shapes in (before, after)]
    tokens = sum(int(run.mask.sum()) for _, [run] in alone)
    assert tokens <= padded[1] < min(padded[0], 1.4 * tokens) and padded[0] > 1.2 * tokens
    assert max(rows * width for rows, width in after) <= max(rows * width for rows, width in before)


@pytest.mark.parametrize("codec", ["int4", "fp32"])
def test_bits_do_not_depend_on_the_ranges_that_are_asked_for(codec, tmp_path):
    """A process asks for its own ranges alone, and not for those that the codec was fitted on."""
    spec = spec_of(bert(), Lengthy(), tmp_path, rows=150, codec=codec)
    whole = dict(run_views(spec, range(spec.source.num_ranges)))
    parts = [range(5), range(5, 22), [22], range(23, spec.source.num_ranges, 2)]
    for numbers in parts:
        for number, [run] in run_views(spec, numbers):
            assert torch.equal(run.features, whole[number][0].features)


@pytest.mark.parametrize(("codec", "tokens"), [("int4", 16.0), ("fp32", 16.0), ("int4", 4e5)])
def test_every_range_is_in_one_group(codec, tokens, tmp_path):
    spec = replace(spec_of(bert(), Lengthy(), tmp_path, rows=150, codec=codec), tokens=tokens)
    groups = {tuple(ranges_together(spec, number)) for number in range(spec.source.num_ranges)}
    assert sorted(number for group in groups for number in group) == [*range(spec.source.num_ranges)]
    assert all(tuple(ranges_together(spec, number)) == group for group in groups for number in group)
    assert (max(map(len, groups)) > 1) == (tokens < 100)  # as far as memory holds their features


UNKNOWN = {
    "one of another width": lambda batch: {"extra": torch.ones(1, 3 + batch["input_ids"].shape[1])},
    "a mask of pairs": lambda batch: {"extra": torch.ones(*batch["input_ids"].shape, batch["input_ids"].shape[1])},
    "the width itself": lambda batch: {"extra": batch["input_ids"].shape[1]},
    "of the number of rows": lambda batch: {"extra": torch.ones(len(batch["input_ids"]) + 1)},
    "padding that says where it is": lambda batch: {
        "extra": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    },
}


@pytest.mark.parametrize("added", UNKNOWN.values(), ids=UNKNOWN)
def test_ranges_with_entries_that_cannot_be_sorted_run_as_they_are(added, tmp_path):
    spec = spec_of(bert(), Lengthy(), tmp_path)

    class Told(ImageFeatures):
        def compute(self, batch, rows):
            return super().compute({name: value for name, value in batch.items() if name != "extra"}, rows)

    def inputs(batch):
        return {**without_labels(batch), **added(batch)}

    features = Told(spec.chain, CUT, spec.source, spec.layout, inputs)
    numbers = range(spec.source.num_ranges)
    runs = list(run_by_length(features, numbers, lambda number: list(numbers)))
    for (_, [one]), (_, [other]) in zip(spec.feature_source.run(numbers), runs, strict=True):
        assert torch.equal(one.features, other.features)


def test_texts_of_one_width_have_the_bits_of_batches_of_that_width(tmp_path):
    spec = spec_of(bert(), Pad(width=32), tmp_path)
    numbers = range(spec.source.num_ranges)
    alone, together = spec.feature_source.run(numbers), run_views(spec, numbers)
    assert all(
        torch.equal(one.features, other.features) for (_, [one]), (_, [other]) in zip(alone, together, strict=True)
    )


def test_what_is_beside_a_text_is_taken_with_its_row(tmp_path):
    """An image, say: it does not become smaller with the texts, so that batches have no more rows than before."""
    spec, seen = spec_of(bert(), Lengthy(), tmp_path), []

    class Told(ImageFeatures):
        def compute(self, batch, rows):
            seen.append((batch["extra"].shape, batch["length"], batch["attention_mask"].sum(1)))
            names = ("input_ids", "attention_mask")
            return super().compute({name: batch[name] for name in names}, rows)

    def inputs(batch):
        lengths = batch["attention_mask"].sum(1)
        return {**without_labels(batch), "extra": lengths[:, None].float().expand(-1, 5), "length": lengths}

    features = Told(spec.chain, CUT, spec.source, spec.layout, inputs)
    list(run_by_length(features, range(spec.source.num_ranges), lambda number: list(range(spec.source.num_ranges))))
    assert all(torch.equal(length, tokens) and len(length) <= 4 for _, length, tokens in seen)


def test_batches_hold_texts_of_like_length():
    lengths = np.array([3, 20, 19, 4, 8, 4, 0, 30, 18])
    batches = [batch.tolist() for batch in batches_by_length(lengths, most_positions=40, most_rows=9)]
    assert batches == [[7], [1, 2], [8], [4], [0, 3, 5], [6]]
    assert [len(batch) for batch in batches_by_length(lengths, 40, most_rows=2)] == [1, 2, 1, 1, 2, 1, 1]
