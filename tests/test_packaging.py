"""The package alone: what it needs to be imported, and what it does not need."""

import subprocess
import sys

#: Packages of the extras, as they are imported.
OPTIONAL = ("evaluate", "matplotlib", "moto", "rich", "s3fs", "scipy", "sklearn", "timm", "zfpy")


def run_python(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_module_is_imported_without_the_packages_of_the_extras():
    code = f"""
import importlib, pkgutil, sys
for package in {OPTIONAL}:
    sys.modules[package] = None  # an import of it fails
import hf_freezecache
hf_freezecache.FreezeCacheTrainer
for module in pkgutil.walk_packages(hf_freezecache.__path__, "hf_freezecache."):
    importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("hf_freezecache.")]))
"""
    assert int(run_python(code)) > 50


def test_help_of_the_command_does_not_wait_for_large_packages(tmp_path):
    code = f"""
import contextlib, io, sys
from hf_freezecache.cli.main import main
large = {{"accelerate", "datasets", "numpy", "pyarrow", "torch", "torchvision", "transformers"}}
commands = ["plan"], ["inspect"], ["verify"], ["clean"], ["head"], ["head", "save"], ["head", "load"], ["head", "push"]
for arguments in (["--help"], *([*command, "--help"] for command in commands)):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main(arguments)
    assert text.getvalue().startswith("usage: freezecache"), arguments
    assert not large & sys.modules.keys(), (arguments, large & sys.modules.keys())
main(["clean", {str(tmp_path)!r}])
print(large & sys.modules.keys() >= {{"datasets", "numpy", "pyarrow", "torch"}})
"""
    # A command that does something imports them.
    assert run_python(code) == f"{tmp_path}: no stores, and none in a folder _freeze_cache of it\nTrue\n"
