"""The blocks that are found in models of timm, and the groups that timm itself divides their parameters into.

`python -m tests.model.test_timm_groups` counts, for all models of the zoo, what docs/models.md says of them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from timm.models import group_parameters

from hf_freezecache import BlockChain
from tests.support.model_zoo import ENTRIES, Entry


@dataclass(frozen=True)
class Compared:
    """Where the parameters of a model are divided.

    Args:
        cuts: number of cuts that were found.
        boundaries: number of boundaries between groups of timm.
        common: of these, those at which exactly the parameters of a cut come before it.
        but_norms: of these, those where what differs are parameters of normalization only.
    """

    cuts: int
    boundaries: int
    common: int
    but_norms: int


def compare(entry: Entry) -> Compared | None:
    """Compares the blocks of a model with timm's coarse groups; None if there are no blocks or no groups."""
    model = entry.make()
    bare = model.model
    try:
        names = [name for name, _ in bare.named_parameters()]
        groups = group_parameters(bare, bare.group_matcher(coarse=True), reverse=True)
        chain = BlockChain.from_model(model, probe=entry.inputs(rows=4))
    except (AttributeError, AssertionError, ValueError):
        return None
    small = {name for name, parameter in bare.named_parameters() if parameter.ndim == 1 and "norm" in name}
    small |= {name for name in names if name.split(".")[-2:-1] in (["bn"], ["bn1"], ["bn2"], ["bn3"])}
    prefixes = [
        frozenset(name.removeprefix("model.") for name in chain.prefix_parameters(cut))
        for cut in range(1, len(chain) + 1)
    ]
    before = [frozenset(name for name in names if groups[name] <= last) for last in sorted(set(groups.values()))[:-1]]
    common = sum(group in prefixes for group in before)
    norms = sum(group not in prefixes and any(group ^ prefix <= small for prefix in prefixes) for group in before)
    return Compared(len(prefixes), len(before), common, norms)


@pytest.mark.parametrize("name", ["timm/vit", "timm/convnext", "timm/swin"])
def test_found_blocks_end_where_timms_groups_end(name):
    found = compare(ENTRIES[name])
    assert found is not None and found.common + found.but_norms == found.boundaries <= found.cuts


if __name__ == "__main__":
    torch.set_num_threads(1)
    all_found = {name: compare(entry) for name, entry in ENTRIES.items() if entry.kind == "timm"}
    kept = [found for found in all_found.values() if found is not None]
    sys.stdout.write(
        f"{len(all_found)} models, {len(kept)} with blocks and coarse groups: {sum(f.cuts for f in kept)} cuts, "
        f"{sum(f.boundaries for f in kept)} boundaries of groups, of these {sum(f.common for f in kept)} are cuts and "
        f"{sum(f.but_norms for f in kept)} differ from one by normalization only; in "
        f"{sum(f.cuts < f.boundaries for f in kept)} models there are fewer cuts than boundaries\n"
    )
