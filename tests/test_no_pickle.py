"""Nothing that anybody may have written is ever unpickled, or run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "hf_freezecache").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
#: Libraries that read code from files, or objects that bring it along.
FORBIDDEN = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "pickletools",
    "yaml",
}
#: Errors travel as pickles between the processes of one training, through its own process group: nobody else can put
#: one there, and none is ever written to a file.
BETWEEN_OWN_PROCESSES = "hf_freezecache/distributed.py"


def find_pickles(code: str) -> list[str]:
    """What could unpickle or run a file's content, in words."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            found += _of_call(node)
    return found


def _of_call(node: ast.Call) -> list[str]:
    function = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if function in ("torch.load", "torch.jit.load", "torch.package.PackageImporter"):
        return [] if given.get("weights_only") == "True" else [function]
    if function.endswith(("read_pickle", "PackageImporter", "torch.hub.load")) or function in ("eval", "exec"):
        return [function]
    if function in ("np.load", "numpy.load"):
        return [] if given.get("allow_pickle", "False") == "False" else [function]
    return [function] if given.get("trust_remote_code") == "True" else []


def test_no_file_is_unpickled():
    found = {str(path.relative_to(ROOT)): find_pickles(path.read_text()) for path in MODULES}
    assert len(found) > 200
    assert {module: kinds for module, kinds in found.items() if kinds} == {BETWEEN_OWN_PROCESSES: ["pickle"]}


def test_pickles_between_processes_are_bytes_in_memory():
    text = (ROOT / BETWEEN_OWN_PROCESSES).read_text()
    assert "pickle.loads(" in text and "pickle.load(" not in text and "pickle.dump(" not in text  # these take files


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "import torch; torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_a_pickle_is_found(code):
    assert len(find_pickles(code)) == 1


def test_safe_ways_are_allowed():
    code = "torch.load(path, weights_only=True); np.load(path); safetensors.torch.load(content); model.eval()"
    assert find_pickles(code) == []
