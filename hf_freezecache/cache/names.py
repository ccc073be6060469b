"""Names of a store's directories, files and columns: how each is written, and how it is read back.

A feature cache directory holds these directories; a fingerprint is 32 hexadecimal digits:

| name | what it is |
|---|---|
| `<fingerprint>` | a complete store |
| `<fingerprint>.partial` | a store that the epochs of a training write |
| `<final>.tmp-<host>-<process>-<random>` | a directory that a process writes until it gets its final name |
| `<name>.removed.tmp-<random>` | a store that is being deleted |
| `.seen-by-all.tmp-<host>-<process>-<random>` | by this the processes of a training find that they see one directory |

A store has these columns; views count from 1:

| name | what a row holds |
|---|---|
| `sample_id` | number of the sample |
| `base`, `special` | codes of the base view, and its special tokens where the codec keeps them apart |
| `view_<v>` | codes of view v: all channels, or the sensitive ones |
| `view_special_<v>` | special tokens of view v |
| `geometry_<v>` | geometry of view v |
| `tokens`, `checksum` | of a text: number of its tokens, each of which has codes; a checksum of what was read |
| `tokens`, `checksum` | also of a sample that has a size of its own: number of the positions of its features |
| `checksum` | also of a sample whose features include padding, and of which a batch takes as much as it is wide |
| `<input>` | a model input as the user's collator returned it |
| `view_<v>.<input>` | a model input that view v has for itself |
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path

# Directories

#: Final name, which it never gets, of the directory by which processes find that they see the same one.
SEEN = ".seen-by-all"
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_PARTIAL_SUFFIX = ".partial"
_ASIDE = re.compile(r"(?P<final>.+?)\.tmp-(?P<host>.+)-(?P<process>[0-9]+)-[0-9a-f]+")
_REMOVED = re.compile(r"(?P<name>.+)\.removed\.tmp-[0-9a-f]+")


def is_fingerprint(name: str) -> bool:
    """Whether a directory is named as a complete store is."""
    return _FINGERPRINT.fullmatch(name) is not None


def partial_path(store: Path) -> Path:
    """The directory in which the epochs of a training write a store.

    Args:
        store: path of the complete store.
    """
    return store.with_name(store.name + _PARTIAL_SUFFIX)


def parse_partial(name: str) -> str | None:
    """The fingerprint in the name of a directory that epochs write; None for any other name."""
    fingerprint = name.removesuffix(_PARTIAL_SUFFIX)
    return fingerprint if fingerprint != name and is_fingerprint(fingerprint) else None


@dataclass(frozen=True)
class AsideName:
    """The parts of the name of a directory that a process writes before it gets its final name.

    Args:
        final: the final name.
        host: machine of the process.
        process: its number on that machine.
    """

    final: str
    host: str
    process: int


def aside_path(final: Path, host: str, process: int) -> Path:
    """A new path for a directory that a process writes before it gets its final name.

    Args:
        final: path of the complete directory.
        host: machine of the process.
        process: its number on that machine.
    """
    return final.with_name(f"{final.name}.tmp-{host}-{process}-{_random_digits()}")


def parse_aside(name: str) -> AsideName | None:
    """Reads the name of an `aside_path`; None for any other name."""
    match = _ASIDE.fullmatch(name)
    return None if match is None else AsideName(match["final"], match["host"], int(match["process"]))


def removed_path(path: Path) -> Path:
    """A new path to which a store is renamed before its files are deleted.

    Args:
        path: of the store.
    """
    return path.with_name(f"{path.name}.removed.tmp-{_random_digits()}")


def parse_removed(name: str) -> str | None:
    """The name that a directory had before it was renamed to a `removed_path`; None for any other name."""
    match = _REMOVED.fullmatch(name)
    return None if match is None else match["name"]


def _random_digits() -> str:
    return uuid.uuid4().hex[:8]


# Files

#: The manifest of a store.
MANIFEST = "manifest.json"
#: What the codec learned, and the tensors of the views.
CODEC_FILE = "codec.safetensors"
#: Two files that `datasets.load_from_disk` reads.
DATASET_INFO_FILE, DATASET_STATE_FILE = "dataset_info.json", "state.json"
#: Which training has built a store; not part of the store, and written only for one that may delete it.
OWNER = ".owner"
_NOTE_SUFFIX = ".safetensors"


def shard_name(index: int, count: int) -> str:
    """File name of an Arrow file, as `datasets` names them: number `index`, from 0, of `count`."""
    return f"data-{index:05d}-of-{count:05d}.arrow"


def is_shard(file: str) -> bool:
    """Whether a file name is that of an Arrow file of a store."""
    return file.endswith(".arrow")


def note_file(note: str) -> str:
    """File name of tensors for people and tools, e.g. `sensitivity`."""
    return note + _NOTE_SUFFIX


def parse_note(file: str) -> str | None:
    """The note that a file of a store holds; None for any other file."""
    note = file.removesuffix(_NOTE_SUFFIX)
    return note if note != file and file != CODEC_FILE else None


def view_tensor(field: str) -> str:
    """Name in the codec's file of a tensor that describes the views."""
    return f"view_{field}"


# Columns

SAMPLE_ID = "sample_id"
#: Columns of the base view.
BASE, SPECIAL = "base", "special"
#: What a view has columns of. In a batch, whose rows have one view each, the entries have these names.
VIEW, VIEW_SPECIAL, GEOMETRY = "view", "view_special", "geometry"
#: Entry of a batch, not a column: which view a row has.
VIEW_INDEX = "view_index"
#: Number of tokens of a text, or of positions of a sample with a size of its own, and a checksum of what was read.
TOKENS, CHECKSUM = "tokens", "checksum"
#: Constants of a store of texts: the sides on which padding may be at replay, and the inputs that were read.
PADDING, INPUTS = "padding", "inputs"
#: Constant of a store whose rows are as wide as the widest sample: how the collator pads.
WIDEST = "widest"
#: Constant of a store of samples of several sizes: the inputs that were read.
SIZES = "sizes"

_VIEW_COLUMN = re.compile(rf"(?P<entry>{VIEW}|{VIEW_SPECIAL}|{GEOMETRY})_(?P<view>[1-9][0-9]*)")
_OWN_INPUT = re.compile(r"view_(?P<view>[1-9][0-9]*)\.(?P<input>.*)", re.DOTALL)
_ENTRIES = frozenset({SAMPLE_ID, BASE, SPECIAL, VIEW, VIEW_SPECIAL, GEOMETRY, VIEW_INDEX})


def view_column(entry: str, view: int) -> str:
    """Column of a view.

    Args:
        entry: `view`, `view_special` or `geometry`.
        view: its number, from 1.
    """
    return f"{entry}_{view}"


def parse_view_column(name: str) -> tuple[str, int] | None:
    """Entry and view of a `view_column`; None for any other name."""
    match = _VIEW_COLUMN.fullmatch(name)
    return None if match is None else (match["entry"], int(match["view"]))


def own_input(view: int, name: str) -> str:
    """Column of a model input that a view has for itself.

    Args:
        view: its number, from 1.
        name: of the model input.
    """
    return f"view_{view}.{name}"


def parse_own_input(name: str) -> tuple[int, str] | None:
    """View and model input of an `own_input`; None for any other name."""
    match = _OWN_INPUT.fullmatch(name)
    return None if match is None else (int(match["view"]), match["input"])


def is_reserved(name: str) -> bool:
    """Whether a store uses a name itself, so that no model input may have it."""
    return name in _ENTRIES or parse_view_column(name) is not None or parse_own_input(name) is not None


def is_packable(name: str) -> bool:
    """Whether a column holds a row's codes, which zstd makes smaller; the other columns are too short to gain."""
    column = parse_view_column(name)
    return name == BASE if column is None else column[0] == VIEW
