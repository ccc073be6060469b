"""The shell commands in the documents name programs, options, extras and targets that exist."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *(ROOT / "docs").glob("*.md"),
]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
Run = Callable[[], object]


def find_commands() -> list[str]:
    """Every command in a bash block, once, without comments and line breaks."""
    commands = {}
    for document in DOCUMENTS:
        for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    commands[shlex.join(words)] = None
    return list(commands)


def options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def help_of(run: Run) -> str:
    """What a program prints for `--help`; any other end than success fails."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
        run()
    assert end.value.code in (0, None)
    return text.getvalue()


def check_options(words: list[str], text: str) -> None:
    missing = {option for option in options(words) if not re.search(rf"(?<![\w-]){option}(?![\w-])", text)}
    assert not missing, f"options that do not exist: {', '.join(sorted(missing))}"


@cache
def freezecache_help(*command: str) -> str:
    module, function = re.search(r'^freezecache = "(.+):(.+)"$', PYPROJECT, re.MULTILINE).groups()
    return help_of(lambda: getattr(importlib.import_module(module), function)([*command, "--help"]))


@cache
def script_help(path: str) -> str:
    folder = str((ROOT / path).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(sys, "argv", [path, "--help"])
        return help_of(lambda: runpy.run_path(str(ROOT / path), run_name="__main__"))


@cache
def module_help(name: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        patch.setattr(sys, "argv", [name, "--help"])
        return help_of(lambda: runpy.run_module(name, run_name="__main__"))


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        check_options(words[2:], module_help(words[1]))
    else:
        check_options(words[1:], script_help(words[0]))


def check_freezecache(words: list[str]) -> None:
    depth = 2 if words[0] in ("head", "predictor") else 1
    check_options(words[depth:], freezecache_help(*words[:depth]))


def check_make(words: list[str]) -> None:
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(words) <= set(targets)


def check_pip(words: list[str]) -> None:
    assert words[:2] == ["install", "-e"]
    extras = re.fullmatch(r"\.(?:\[(.+)\])?", words[2])[1]
    assert all(re.search(rf"^{extra} = \[$", PYPROJECT, re.MULTILINE) for extra in (extras or "").split(",") if extra)


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    launch = launch_command_parser().parse_args(words[1:])
    check_python([launch.training_script, *launch.training_script_args])


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    launch = get_args_parser().parse_args(words)
    check_python([launch.training_script, *launch.training_script_args])


CHECKS = {
    "accelerate": check_accelerate,
    "freezecache": check_freezecache,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
}


@pytest.mark.parametrize("command", find_commands())
def test_command_names_what_exists(command):
    program, *words = shlex.split(command)
    CHECKS[program](words)


@pytest.mark.parametrize(
    "command",
    [
        "freezecache plan MODEL --data photos --no-such-option 3",
        "freezecache head push head ann/head --no-such-option",
        "python recipes/quickstart.py --epoch_count 3",
        "torchrun --nproc_per_node 2 recipes/quickstart.py --no_such_option",
        "make everything",
        'pip install -e ".[recipe]"',
    ],
)
def test_command_with_a_name_that_does_not_exist_fails(command):
    program, *words = shlex.split(command)
    with pytest.raises(AssertionError):
        CHECKS[program](words)
