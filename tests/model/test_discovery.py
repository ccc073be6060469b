"""Blocks of any model: found in a run of it, every cut proved, or refused with a reason that names what crosses.

`python -m tests.model.test_discovery --renew` writes the table of docs/models.md.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.proofs import UnrepeatableError, assert_outputs_equal, assert_steps_equal, spread_cuts
from torch import nn

from hf_freezecache import BlockChain
from hf_freezecache.model.errors import ChainError
from hf_freezecache.model.tokens import token_mask
from tests.support.model_zoo import ENTRIES, QUICK, Entry

#: Models that cannot be cut, and a part of the reason.
REFUSED = {"text/reformer/ReformerForSequenceClassification": "running the rest on the feature failed"}
#: Layers that run several times with the same weights: only what comes before them can be frozen.
SHARED_LAYERS = "/albert/"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end of the table -->)", re.S)


@dataclass(frozen=True)
class Found:
    """What was found of a model.

    Args:
        blocks: names.
        share: of the FLOPs that a replay at the last cut leaves out.
        tensors: most that cross a cut.
        padding: of texts, sides on which it is left out at some cut; None: the model has no texts with a mask.
        refused: why it cannot be cut.
    """

    blocks: tuple[str, ...] = ()
    share: float = 0.0
    tensors: int = 1
    padding: frozenset[str] | None = None
    refused: str | None = None


def look(entry: Entry, most_cuts: int) -> Found:
    """Finds the blocks of a model, and proves cuts on rows, lengths and paddings that it was not traced on."""
    model = entry.make()
    keys = list(model.state_dict())
    try:
        chain = BlockChain.from_model(model, probe=entry.inputs(rows=4, seed=1))
        batch, cuts = entry.inputs(rows=3, seed=2), spread_cuts(chain, most_cuts)
        assert_outputs_equal(chain, batch, cuts)
        assert_steps_equal(chain, batch, cuts)
    except (ChainError, UnrepeatableError) as error:
        return Found(refused=str(error))
    assert list(model.state_dict()) == keys
    numbers = range(1, len(chain) + 1)
    tensors = max(chain.crossing(cut) for cut in numbers)
    has_mask = token_mask(batch, chain.main_input) is not None
    padding = frozenset().union(*map(chain.padding.ignored, numbers)) if has_mask else None
    return Found(tuple(chain.names), chain.share(len(chain)), tensors, padding)


@pytest.mark.parametrize("name", QUICK)
def test_blocks_are_found_and_every_cut_is_proved_or_refused_in_words(name):
    found = look(ENTRIES[name], most_cuts=3)
    if name in REFUSED:
        assert found.refused is not None and REFUSED[name] in found.refused
    else:
        assert found.refused is None and len(found.blocks) > 1 and found.share > 0.5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", sorted({entry.kind for entry in ENTRIES.values()}))
def test_every_family_is_right_or_refused(kind):
    found = {name: look(entry, most_cuts=6) for name, entry in ENTRIES.items() if entry.kind == kind}
    refused = {name: result.refused for name, result in found.items() if result.refused is not None}
    assert refused.keys() == {name for name in REFUSED if name.startswith(f"{kind}/")}, refused
    assert all(REFUSED[name] in why for name, why in refused.items())
    shallow = {
        name: result.share
        for name, result in found.items()
        if result.refused is None and result.share < 0.5 and SHARED_LAYERS not in name
    }
    assert not shallow, f"cuts that bypass less than half of the model: {shallow}"


# What the blocks are


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.mix(self.norm(x))


class Stack(nn.Module):
    """A stem, layers, a norm and a head; what runs between them varies."""

    def __init__(self, wiring="plain"):
        super().__init__()
        self.wiring = wiring
        self.stem, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.act = nn.GELU()

    def forward(self, x):
        first = x = self.act(self.stem(x))
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if self.wiring == "shared activation":
                x = self.act(x)
            if self.wiring == "skip" and number == 2:
                x = x + first
        if self.wiring == "long skip":
            x = x + first
        return self.head(self.norm(x).mean(1))


LAYERS = [f"layers.{number}" for number in range(4)]


@pytest.mark.parametrize(
    ("wiring", "blocks"),
    [
        ("plain", ["stem", *LAYERS]),
        ("shared activation", ["stem", *LAYERS]),
        ("skip", ["stem", *LAYERS]),
        ("long skip", ["stem", *LAYERS]),
    ],
)
def test_blocks_are_the_layers_whatever_passes_beside_them(wiring, blocks):
    torch.manual_seed(0)
    model = Stack(wiring).eval()
    chain = BlockChain.from_model(model, probe={"x": torch.randn(2, 5, 4)})
    assert chain.names == blocks
    batch = {"x": torch.randn(3, 5, 4)}
    cuts = list(range(1, len(chain) + 1))
    assert_outputs_equal(chain, batch, cuts)
    assert_steps_equal(chain, batch, cuts)


def test_no_cut_between_parts_that_read_one_parameter_on_both_sides():
    """A replay begins at the third layer, in front of which a weight is used that the fourth uses as well."""

    class Scaled(Stack):
        def __init__(self):
            super().__init__()
            self.scale, self.act = nn.Parameter(torch.ones(8)), nn.Identity()

        def forward(self, x):
            x = self.layers[1](self.layers[0](self.stem(x)))
            x = self.layers[2](x * self.scale)
            return self.head(self.norm(self.layers[3](x) * self.scale).mean(1))

    torch.manual_seed(0)
    chain = BlockChain.from_model(Scaled().eval(), probe={"x": torch.randn(2, 5, 4)})
    assert chain.names == ["stem", "layers.0", "layers.1"]
    assert not any(chain.shared_parameters(cut)[0] for cut in range(1, len(chain) + 1))
    assert_steps_equal(chain, {"x": torch.randn(3, 5, 4)}, [1, 2, 3])


def test_refusal_names_what_crosses():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.scale = nn.Linear(4, 3), nn.Linear(4, 3), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * self.left(x).mean(1) + self.right(x).mean(1)

    with pytest.raises(ChainError, match="cut anywhere.*after 'left' the model's input 'x' is used behind it"):
        BlockChain.from_model(Twins().eval(), probe={"x": torch.randn(2, 5, 4)})


# The table


def table() -> str:
    """Every model of the zoo with what was found."""
    lines = ["| model | blocks | first and last block | not run at the last cut | remark |", "|---|---|---|---|---|"]
    for name, entry in ENTRIES.items():
        found = look(entry, most_cuts=6)
        if found.refused is not None:
            lines.append(f"| {name} | | | | refused: {REFUSED.get(name, found.refused)} |")
        else:
            ends = f"`{found.blocks[0]}` to `{found.blocks[-1]}`"
            remarks = [] if found.tensors == 1 else [f"up to {found.tensors} tensors cross"]
            if found.padding is not None:
                remarks.append(f"no padding ({', '.join(sorted(found.padding))})" if found.padding else "padding kept")
            share = f"{100 * found.share:.0f} %"
            remark = "; ".join(remarks)
            lines.append(f"| {name} | {len(found.blocks)} | {ends} | {share} | {remark}{' ' if remark else ''}|")
    kinds = Counter(entry.kind for entry in ENTRIES.values())
    lines += ["", f"{len(ENTRIES)} models: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + "."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__" and "--renew" in sys.argv:
    torch.set_num_threads(1)
    text = table()
    PAGE.write_text(TABLE.sub(lambda match: match[1] + text + match[2], PAGE.read_text()))
