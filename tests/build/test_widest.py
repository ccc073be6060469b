"""The widest sample of a data set, and how a collator pads the others beside it."""

import pytest
import torch
from support.sounds import PadSounds, Sounds
from support.token_rows import Choices, Pad, PadChoices, Texts

from hf_freezecache.build.padded_samples import collator_pads
from hf_freezecache.build.widest import narrow_batch, rows_by_width, widened, widest_of
from hf_freezecache.cache.padded import PaddedEntry
from hf_freezecache.cache.rows import ChosenRows, RowError, RowSource


def source(samples, collator, batch_size=8, **settings):
    return RowSource(samples, collator, batch_size, 0, **settings)


def lengths(sounds):
    return [len(row["input_values"]) for row in sounds.rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_widest_of_all_samples_is_found(workers):
    sounds = Sounds(50)
    before = torch.get_rng_state()
    found = widest_of(source(sounds, PadSounds(), num_workers=workers), "input_values")
    assert found == max(range(50), key=lengths(sounds).__getitem__)
    assert torch.equal(before, torch.get_rng_state())


def test_batches_beside_the_widest_have_its_width_and_the_samples_in_their_order():
    sounds = Sounds(20, letters=True)
    wide = widened(source(sounds, PadSounds()), "input_values", {"input_values", "attention_mask"})
    for chosen in ([3], [5, 1, 5]):
        batch = wide.collate(chosen)
        assert batch["input_values"].shape == (len(chosen), max(lengths(sounds)))
        for row, values in zip(chosen, batch["input_values"], strict=True):
            assert torch.equal(values[: lengths(sounds)[row]], sounds.rows[row]["input_values"])
    assert len(batch["labels"]) == 3
    assert ChosenRows(wide, [4, 2]).rule == wide.rule


def test_widest_is_looked_for_once():
    class Counted(Sounds):
        drawn = 0

        def __getitem__(self, row):
            Counted.drawn += 1
            return super().__getitem__(row)

    samples = source(Counted(64), PadSounds())
    wide = widened(samples, "input_values", {"input_values"})
    assert Counted.drawn < 2 * 64
    Counted.drawn = 0
    assert widened(samples, "input_values", {"input_values"}) is wide and Counted.drawn == 0
    more = widened(samples, "input_values", {"attention_mask"})
    assert more.rule.entries.keys() == {"input_values", "attention_mask"} and Counted.drawn < 32


@pytest.mark.parametrize("side", ["right", "left"])
def test_side_and_filling_of_padding(side):
    sounds = widened(source(Sounds(), PadSounds(side=side)), "input_values", {"input_values", "attention_mask"})
    assert sounds.rule.side == side
    assert sounds.rule.entries == {"input_values": PaddedEntry(0, 0.0), "attention_mask": PaddedEntry(0, 0)}
    texts = widened(source(Texts(), Pad(side)), "input_ids", {"input_ids"})
    assert texts.rule.side == side and texts.rule.size == (13,)
    choices = widened(source(Choices(), PadChoices(side)), "input_ids", {"input_ids"})
    assert choices.rule.entries["input_ids"] == PaddedEntry(1, 0) and choices.rule.size == (3, 13)


class WithEntry(PadSounds):
    """Adds an entry to batches."""

    def __init__(self, make, **settings):
        super().__init__(**settings)
        self.make = make

    def __call__(self, samples):
        batch = super().__call__(samples)
        return {**batch, "other": self.make(samples, batch["input_values"])}


@pytest.mark.parametrize(
    "make",
    [
        lambda samples, values: values + values.mean(),
        lambda samples, values: torch.arange(values.shape[1]).expand(values.shape),
        lambda samples, values: torch.arange(values.shape[1])[None],
        lambda samples, values: torch.ones(len(samples), max(row["labels"] for row in samples) + 1),
        lambda samples, values: torch.zeros(len(samples), values.shape[1], values.shape[1]),
    ],
    ids=["of the batch", "positions", "one row for all", "a width of its own", "two widths"],
)
def test_entries_that_are_not_padded_with_one_value_are_refused(make):
    with pytest.raises(RowError, match="cannot be told how the collator pads 'other'"):
        widened(source(Sounds(), WithEntry(make)), "input_values", {"input_values", "other"})


def test_entries_without_a_width_are_taken_as_they_are():
    collator = WithEntry(lambda samples, values: torch.tensor([row["labels"] for row in samples]))
    wide = widened(source(Sounds(), collator), "input_values", {"input_values", "other"})
    assert wide.rule.entries["other"] is None


def test_entries_that_the_collator_does_not_return_are_named():
    with pytest.raises(RowError, match="read 'speed', which the collator does not return"):
        widened(source(Sounds(), PadSounds()), "input_values", {"input_values", "speed"})


def test_narrow_batches_and_rows_in_the_order_of_their_widths():
    sounds = Sounds(40)
    samples = source(sounds, PadSounds())
    widths = [lengths(sounds)[row] for row in rows_by_width(samples, "input_values")]
    assert widths == sorted(widths) and len(widths) == 16
    assert narrow_batch(samples, "input_values")["input_values"].shape[1] < max(lengths(sounds))


@pytest.mark.parametrize(
    ("samples", "collator", "name", "pads"),
    [
        (Sounds(), PadSounds(), "input_values", True),
        (Sounds(), PadSounds(width=300), "input_values", False),
        (Sounds(shortest=80, longest=80), PadSounds(), "input_values", False),
        (Texts(), Pad(), "input_ids", True),
        (Texts(), Pad(width=20), "input_ids", False),
        (Sounds(), PadSounds(), "pixel_values", False),
    ],
)
def test_collators_that_pad_are_found(samples, collator, name, pads):
    assert collator_pads(source(samples, collator), name) == pads
