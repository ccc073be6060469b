"""The list of slow tests names tests that exist: a name that is none would leave a test in the quick suite."""

import ast
from pathlib import Path

from slow_tests import LONG, MANY_CASES


def test_slow_tests_exist():
    for path, names in [*MANY_CASES.items(), *LONG.items()]:
        tree = ast.parse((Path(__file__).parent / path).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert set(names) <= found, path


def test_no_test_is_listed_twice():
    for path, names in LONG.items():
        assert not set(names) & set(MANY_CASES.get(path, ())), path
