"""Names of directories, files and columns: what is written is read back, and nothing else is."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freezecache.cache import names

FINGERPRINT = "0123456789abcdef" * 2
fingerprints = st.text("0123456789abcdef", min_size=32, max_size=32)
hosts = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", fullmatch=True).filter(lambda host: len(host) < 64)
processes = st.integers(1, 2**22)
views = st.integers(1, 10**6)
entries = st.sampled_from([names.VIEW, names.VIEW_SPECIAL, names.GEOMETRY])


def kinds_of(name: str) -> list[str]:
    """Which kinds of directories a name could be one of."""
    readers = {
        "store": names.is_fingerprint,
        "partial": names.parse_partial,
        "aside": names.parse_aside,
        "removed": names.parse_removed,
    }
    return [kind for kind, read in readers.items() if read(name)]


# Directories


@given(fingerprints)
def test_partial_directory_is_named_by_its_store(fingerprint):
    path = names.partial_path(Path("stores") / fingerprint)
    assert path.parent == Path("stores") and path.name == f"{fingerprint}.partial"
    assert names.parse_partial(path.name) == fingerprint
    assert kinds_of(path.name) == ["partial"] and kinds_of(fingerprint) == ["store"]


@given(fingerprints, st.booleans(), hosts, processes)
def test_aside_directory_says_what_it_becomes_and_who_writes_it(fingerprint, partial, host, process):
    final = Path("stores") / fingerprint
    final = names.partial_path(final) if partial else final
    path = names.aside_path(final, host, process)
    assert path.parent == final.parent
    assert names.parse_aside(path.name) == names.AsideName(final.name, host, process)
    assert kinds_of(path.name) == ["aside"]
    assert names.aside_path(final, host, process) != path


@given(fingerprints)
def test_removed_directory_remembers_its_name(fingerprint):
    path = names.removed_path(Path("stores") / fingerprint)
    assert path.parent == Path("stores") and names.parse_removed(path.name) == fingerprint
    assert kinds_of(path.name) == ["removed"]
    assert names.removed_path(Path("stores") / fingerprint) != path


@pytest.mark.parametrize(
    "name",
    [
        "photos",
        FINGERPRINT[:-1],
        FINGERPRINT + "0",
        FINGERPRINT.upper(),
        ".partial",
        f"{FINGERPRINT[:-1]}.partial",
        f"{FINGERPRINT}.partial.bak",
        f"{FINGERPRINT}.tmp-host-1",
        f"{FINGERPRINT}.tmp-host-one-0a",
        f"{FINGERPRINT}.tmp-host-1-xyz",
        f"{FINGERPRINT}.removed",
        f"{FINGERPRINT}.removed.tmp-xyz",
    ],
)
def test_other_directories_are_not_ours(name):
    assert kinds_of(name) == []


def test_process_of_a_host_whose_name_ends_in_a_number_is_read_from_the_right():
    name = f"{FINGERPRINT}.tmp-node-7-42-0a1b2c3d"
    assert names.parse_aside(name) == names.AsideName(FINGERPRINT, "node-7", 42)


# Files


def test_shards_are_named_as_datasets_names_them():
    assert names.shard_name(0, 1) == "data-00000-of-00001.arrow"
    assert names.shard_name(11, 12) == "data-00011-of-00012.arrow"


@given(st.text(min_size=1).filter(lambda note: note != "codec"))
def test_notes_come_back_by_their_names(note):
    assert names.parse_note(names.note_file(note)) == note


@pytest.mark.parametrize("file", [names.CODEC_FILE, names.MANIFEST, names.shard_name(0, 1), "sensitivity"])
def test_other_files_are_no_notes(file):
    assert names.parse_note(file) is None


# Columns


@given(entries, views)
def test_columns_of_views_come_back(entry, view):
    column = names.view_column(entry, view)
    assert names.parse_view_column(column) == (entry, view) and names.parse_own_input(column) is None
    assert names.is_reserved(column)


@given(views, st.text())
def test_own_inputs_of_views_come_back(view, name):
    column = names.own_input(view, name)
    assert names.parse_own_input(column) == (view, name) and names.parse_view_column(column) is None
    assert names.is_reserved(column)


@pytest.mark.parametrize("name", ["sample_id", "base", "special", "view", "view_special", "geometry", "view_index"])
def test_names_of_a_store_itself_are_reserved(name):
    assert names.is_reserved(name)


@pytest.mark.parametrize(
    "name", ["labels", "pixel_values", "views", "view_0", "view_01", "view_1_mask", "base_1", "view_x.labels", "a.b"]
)
def test_other_inputs_keep_their_names(name):
    assert not names.is_reserved(name)
    assert names.parse_view_column(name) is None and names.parse_own_input(name) is None


@pytest.mark.parametrize(
    ("column", "packable"),
    [
        ("base", True),
        ("view_1", True),
        ("view_12", True),
        ("view", False),
        ("special", False),
        ("view_special_1", False),
        ("geometry_1", False),
        ("view_1.labels", False),
        ("sample_id", False),
    ],
)
def test_codes_alone_are_packed(column, packable):
    assert names.is_packable(column) == packable
