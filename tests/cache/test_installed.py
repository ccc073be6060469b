"""Whose code a module is: that of a package, wherever an installer has put it, or the user's own."""

import importlib
import sys

import pytest

from hf_freezecache.cache.installed import _is_installed, is_installed


@pytest.fixture
def placed(tmp_path, monkeypatch):
    """Imports a module or a package from a folder, with what an installer has noted there."""

    def place(name, folder, record=None, is_package=True):
        here = tmp_path / folder
        here.mkdir(parents=True, exist_ok=True)
        if is_package:
            (here / name).mkdir()
        (here / name / "__init__.py" if is_package else here / f"{name}.py").write_text("def function(): return 1\n")
        if record is not None:
            (here / "some_package-1.0.dist-info").mkdir()
            (here / "some_package-1.0.dist-info" / "RECORD").write_text(record)
        monkeypatch.syspath_prepend(str(here))
        importlib.invalidate_caches()
        importlib.import_module(name)
        return name

    before = set(sys.modules)
    yield place
    for name in set(sys.modules) - before:
        del sys.modules[name]
    _is_installed.cache_clear()


@pytest.mark.parametrize(
    "folder",
    ["venv/lib/python3.11/site-packages", "usr/lib/python3/dist-packages", ".local/lib/python3.12/site-packages"],
)
def test_folders_of_packages_of_any_python_count(folder, placed):
    assert is_installed(placed("freezecache_probe_a", folder) + ".inner")


@pytest.mark.parametrize("is_package", [True, False])
def test_a_folder_to_which_an_installer_has_copied_it_counts(is_package, placed):
    file = "freezecache_probe_b/__init__.py" if is_package else "freezecache_probe_b.py"
    assert is_installed(placed("freezecache_probe_b", "target", f"other.py,,\n{file},sha256=1,24\n", is_package))


@pytest.mark.parametrize(
    "record",
    [None, "other.py,,\n", "__editable__.freezecache_probe_c-1.0.pth,,\n", "freezecache_probe_core/__init__.py,,\n"],
)
def test_code_of_the_user_does_not(record, placed):
    assert not is_installed(placed("freezecache_probe_c", "work", record))


def test_a_record_that_cannot_be_read_ends_nothing(placed, tmp_path):
    (tmp_path / "work" / "broken-1.0.dist-info" / "RECORD").mkdir(parents=True)
    name = placed("freezecache_probe_d", "work")
    assert not is_installed(name)
