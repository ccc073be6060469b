"""What a training says of its schedule, before its first step, and of its stores."""

from __future__ import annotations

from collections.abc import Sequence

from ..cache.store import FeatureStore
from ..policies import FreezePolicy, FrozenFromStart, NonePolicy
from ..units import show_bytes

#: Of random samples of which no view is stored.
NO_VIEWS = (
    "The train data set is random (transform or collator): every replay epoch repeats what is drawn when the feature "
    "store is built (views=0); augmentation ends at the freeze point."
)

#: Of a resumed training whose nodes store other shares.
OTHER_NODES = (
    "The checkpoint's training has dealt its rows to other nodes than this one does (other numbers of nodes or "
    "processes, other batches, or another cache_scope): an epoch that was broken off goes on in another order, and "
    "stores are built again."
)


def describe_schedule(policy: FreezePolicy, num_blocks: int, num_epochs: int, cut: int = 0) -> str | None:
    """One line on what will be frozen and when.

    Args:
        policy: the rule.
        num_blocks: number of blocks.
        num_epochs: epochs of the whole training.
        cut: number of blocks that are frozen already, after a resume.

    Returns:
        The line; None if the rule decides as the training goes: the first freeze is announced then. None for 'none'.
    """
    changes = policy.changes(num_blocks, num_epochs)
    if changes is None or isinstance(policy, NonePolicy):
        return None
    steps = [(epoch, deeper) for epoch, deeper in changes if epoch < num_epochs and deeper > cut]
    late = [(epoch, deeper) for epoch, deeper in changes if epoch >= num_epochs]
    if steps or cut:
        line = _describe(policy, steps, num_blocks, cut)
    else:
        line = f"Nothing will be frozen in this training of {_epochs(num_epochs)} ({policy.describe()})."
    if late:
        points = ", ".join(f"cut {deeper} in epoch {epoch}" for epoch, deeper in late)
        line += f" Without effect, as epochs count from 0 and the last one is {num_epochs - 1}: {points}."
    return line


def describe_freeze(policy: FreezePolicy, cut: int, num_blocks: int, epoch: int) -> str:
    """The line on the first freeze of a rule that decides as the training goes."""
    return _describe(policy, [(epoch, cut)], num_blocks)


def describe_other_rule(before: str, policy: FreezePolicy, cut: int) -> str | None:
    """What to say where a training goes on with another rule than its checkpoint's; None if it is the same.

    Args:
        before: the checkpoint's rule, as `FreezePolicy.describe` named it.
        policy: the rule now.
        cut: frozen blocks of the checkpoint.
    """
    if before == policy.describe():
        return None
    return (
        f"The checkpoint was trained with another rule ({before}) than this training has ({policy.describe()}): the "
        f"{cut} blocks that are frozen there stay frozen, and the new rule holds from here on."
    )


def describe_other_rates(before: str | None, now: str | None) -> str | None:
    """What to say where blocks get other learning rates than in the checkpoint; None if they do not.

    Args:
        before: the checkpoint's settings of them; None: blocks had none of their own.
        now: those of this training.
    """
    if before == now:
        return None
    none = "no learning rates of their own"
    return (
        f"The checkpoint was trained with other learning rates of blocks ({before or none}) than this training has "
        f"({now or none}), which hold from here on. To go on as before, set what it was trained with."
    )


def _describe(policy: FreezePolicy, steps: Sequence[tuple[int, int]], num_blocks: int, cut: int = 0) -> str:
    parts = [f"{cut} of {num_blocks} blocks are frozen"] if cut else []
    for epoch, deeper in steps:
        count = f"{deeper} of {num_blocks}" if parts else f"{deeper} of {num_blocks} blocks are frozen"
        only = " (only the head trains)" if deeper == num_blocks else ""
        parts.append(f"from epoch {epoch}, {count}{only}")
    text = ", ".join(parts)
    remedy = "policy='none' keeps all training"
    if isinstance(policy, FrozenFromStart):
        remedy = "policy='none' and layer_decay_min=0 keep all training"
    return f"{text[0].upper()}{text[1:]}: policy {policy.name}; {remedy}."


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"


def describe_draws(why_not: str | None, draws: int, size: int) -> str:
    """The line on a store of whole draws.

    Args:
        why_not: why augmentation cannot be replayed, as a clause.
        draws: of every sample.
        size: bytes of the store.
    """
    return (
        f"Augmentation cannot be replayed from one base view, because {why_not}: {draws} whole draws of every sample "
        f"are stored ({show_bytes(size)}), {draws} times the bytes of one, and replay epochs repeat them."
    )


def describe_unshared(why: str) -> str:
    """The line on a data set that may be a range of rows of a larger one, with `share_store`.

    Args:
        why: why nothing tells of which, as the end of a sentence.
    """
    return (
        "share_store: the store of this training holds its own rows alone. If the train data set is a range of rows "
        f"of a larger one (`select(range(...))`), nothing tells of which: {why}. To share one store among ranges, "
        "shuffle the larger data set once before you split it (`shuffle(seed=0)`), or save it with `save_to_disk` and "
        "split what `load_from_disk` returns."
    )


def describe_built(store: FeatureStore, codec: str, is_deepened: bool, num_blocks: int) -> str:
    """The line on a store that was built.

    Args:
        store: the store.
        codec: the configured one.
        is_deepened: whether it was made from the store before it.
        num_blocks: number of blocks.
    """
    own, origin = store.manifest.codec, "from the store before it, " if is_deepened else ""
    codec = own if own == codec else f"{own}, since {codec} does not fit"
    return (
        f"Built the feature store {store.path} ({origin}{show_bytes(store.bytes)}, {codec}, {describe_rows(store)}"
        f"{describe_views(store)}): training does not run {store.manifest.cut} of {num_blocks} blocks any more."
    )


def describe_rows(store: FeatureStore) -> str:
    """How many samples a store holds."""
    if store.share is None:
        return f"{len(store)} samples"
    nodes = len(store.share.counts)
    return f"{store.manifest.rows} of {len(store)} samples, those of the first of {nodes} nodes"


def describe_views(store: FeatureStore) -> str:
    """The augmented views that a store holds, as the end of a list; empty if it has none."""
    views, layout = store.views.spec, store.codec.layout
    if not views.count:
        return ""
    text = f", {views.count} augmented view{'s' if views.count > 1 else ''} each"
    if views.whole or views.channels is None:
        return f"{text}, whole"
    return f"{text}, {len(views.channels)} of {layout.channels} channels of it"
