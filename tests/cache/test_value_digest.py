"""Digests of values: equal for what is the same in another run, another for whatever can change what code does."""

import dataclasses
import functools
import importlib
import random
import sys
import threading
import time

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from hf_freezecache.cache import value_digest
from hf_freezecache.cache.value_digest import Undigestible, ValueDigest


def digest(value, **settings):
    return ValueDigest(**settings).hex(value)


def cell(source, name, **scope):
    """What a notebook cell defines: there is no file behind it."""
    scope = {"torch": torch, "nn": nn, "F": F, "np": np, "functools": functools, **scope}
    exec(compile(source, "<cell>", "exec"), scope)
    return scope[name]


FUNCTIONS = {
    "constant": ("def f(x): return x + {}", "1", "2"),
    "operator": ("def f(x): return x {} 2", "+", "-"),
    "default": ("def f(x, y={}): return x + y", "1", "2"),
    "keyword default": ("def f(x, *, y={}): return x + y", "1", "2"),
    "global": ("SCALE = {}\ndef f(x): return x * SCALE", "1.0", "2.0"),
    "helper": ("def helper(x): return x + {}\ndef f(x): return helper(x)", "1", "2"),
    "helper of a helper": ("def h(x): return x + {}\ndef g(x): return h(x)\ndef f(x): return g(x)", "1", "2"),
    "constant of a helper": ("C = {}\ndef h(x): return x + C\ndef f(x): return h(x)", "1", "2"),
    "table": ("MEANS = {{'a': [{}]}}\ndef f(x): return x - MEANS['a'][0]", "0.5", "0.6"),
    "array": ("M = np.array([0, {}])\ndef f(x): return x - M[1]", "1", "2"),
    "lambda": ("f = lambda x: x + {}", "1", "2"),
    "closure": ("def make(k):\n    return lambda x: x + k\nf = make({})", "1", "2"),
    "partial": ("def g(x, k): return x + k\nf = functools.partial(g, k={})", "1", "2"),
    "partial of a built-in": ("f = functools.partial(torch.add, other={})", "1", "2"),
    "decorated": ("def g(x): return x + {}\nf = torch.no_grad()(g)", "1", "2"),
    "cached": ("@functools.lru_cache\ndef f(x): return x + {}", "1", "2"),
    "inner function": ("def f(x):\n    def g(y): return y + {}\n    return g(x)", "1", "2"),
    "comprehension": ("def f(xs): return [x + {} for x in xs]", "1", "2"),
    "library function": ("f = F.{}", "relu", "gelu"),
    "built-in": ("f = torch.{}", "relu", "tanh"),
    "method": ("class A:\n    def f(self, x): return x + {}\nf = A().f", "1", "2"),
    "state of a method's object": (
        "class A:\n    def f(self, x): return x + self.k\na = A(); a.k = {}\nf = a.f",
        "1",
        "2",
    ),
    "base class": ("class B:\n    def g(self): return {}\nclass A(B): pass\nf = A", "1", "2"),
    "class attribute": ("class A:\n    k = {}\nf = A", "1", "2"),
    "property": ("class A:\n    @property\n    def k(self): return {}\nf = A", "1", "2"),
    "static method": ("class A:\n    @staticmethod\n    def k(): return {}\nf = A", "1", "2"),
    "slots": ("class A:\n    __slots__ = ('k',)\na = A(); a.k = {}\nf = a", "1", "2"),
    "module": ("f = nn.Dropout({})", "0.1", "0.2"),
    "list made from a class": ("class L(list): pass\nf = L([{}])", "1", "2"),
    "calls itself": ("def f(x): return f(x - {})", "1", "2"),
}


@pytest.mark.parametrize("kind", list(FUNCTIONS))
def test_code_counts_by_what_it_does(kind):
    source, one, other = FUNCTIONS[kind]
    first, again, second = (cell(source.format(value), "f") for value in (one, one, other))
    assert digest(first) == digest(again) != digest(second)


def test_place_of_code_does_not_count():
    source = "def f(x):\n    return x + 1"
    assert digest(cell(source, "f")) == digest(cell("\n\n# a comment\n" + source, "f"))


def test_globals_that_code_does_not_name_do_not_count():
    source = "def f(x): return x.size"
    assert digest(cell(source, "f", other=1)) == digest(cell(source, "f", other=2))


@pytest.mark.parametrize(
    "how",
    [
        "import mine\ndef f(x): return mine.scale(x)",
        "from mine import scale\ndef f(x): return scale(x)",
        "def f(x):\n    from mine import scale\n    return scale(x)",
    ],
)
@pytest.mark.parametrize("body", ["def scale(x): return x * {}", "K = {}\ndef scale(x): return x * K"])
def test_edited_module_of_the_user_counts(how, body, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for value in ("1", "1", "25"):
        (tmp_path / "mine.py").write_text(body.format(value))
        importlib.invalidate_caches()
        sys.modules.pop("mine", None)
        importlib.import_module("mine")
        digests.append(digest(cell(how, "f")))
    sys.modules.pop("mine")
    assert digests[0] == digests[1] != digests[2]


def test_version_of_a_library_counts(monkeypatch):
    before = digest(v2.Resize(4))
    monkeypatch.setattr(value_digest, "describe_origin", lambda module: f"{module} 99")
    monkeypatch.setattr("hf_freezecache.cache.code_digest.describe_origin", lambda module: f"{module} 99")
    assert digest(v2.Resize(4)) != before


def test_method_put_into_a_class_of_a_library_counts(monkeypatch):
    before = digest(v2.Resize)
    monkeypatch.setattr(v2.Resize, "transform", cell("def transform(self, inpt, params): return inpt", "transform"))
    assert digest(v2.Resize) != before


def test_constant_of_a_library_transform_counts():
    normalize = [v2.Compose([v2.Normalize([mean], [1.0])]) for mean in (0.4, 0.4, 0.5)]
    assert digest(normalize[0]) == digest(normalize[1]) != digest(normalize[2])


@dataclasses.dataclass(frozen=True)
class Rows:
    size: int
    names: list = dataclasses.field(default_factory=list)


def test_data_classes_count_by_what_they_hold():
    rows = [Rows(1), Rows(2), Rows(1, ["a"]), Rows]
    assert len({digest(value) for value in rows}) == len(rows)
    assert digest(Rows(1)) == digest(Rows(1))


def test_containers_count_by_what_they_hold():
    loop: list = [1]
    loop.append(loop)
    values = [1, 1.0, True, "1", b"1", None, [1], (1,), {1}, {1: 2}, {2: 1}, np.array([1]), torch.tensor([1]), loop]
    values += [
        torch.tensor([1.0]),
        np.array([1], "int32"),
        np.array(["1"], object),
        torch.tensor([[1]]),
        torch.float32,
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"b", "a", "c"}) == digest({"c", "a", "b"})
    shared = [1, 2]
    assert digest([shared, shared]) == digest([[1, 2], [1, 2]])


def test_images_and_generators_of_numbers():
    pictures = [PIL.Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (1, 1, 2)]
    assert digest(pictures[0]) == digest(pictures[1]) != digest(pictures[2])
    assert digest([random.Random(1), threading.Lock()]) == digest([random.Random(2), threading.Lock()])


def test_quantized_and_sparse_tensors_count_by_what_they_hold():
    def quantized(scale):
        return torch.quantize_per_tensor(torch.arange(4.0), scale, 0, torch.quint8)

    assert digest(quantized(0.5)) == digest(quantized(0.5)) != digest(quantized(0.25))
    assert (
        digest(torch.eye(3).to_sparse()) == digest(torch.eye(3).to_sparse()) != digest(torch.eye(3).mul(2).to_sparse())
    )
    with pytest.raises(Undigestible, match="meta"):
        digest(torch.empty(2, device="meta"))


def test_tensor_of_a_library_that_packs_its_values_counts_by_its_parts():
    class Packed(torch.Tensor):
        @staticmethod
        def __new__(cls, codes, scale):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes, scale):
            self.codes, self.scale = codes, scale

        def __tensor_flatten__(self):
            return ["codes"], {"scale": self.scale}

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.detach.default:
                return args[0]
            raise NotImplementedError(function)

    codes = torch.arange(4, dtype=torch.uint8)
    assert digest(Packed(codes, 1)) == digest(Packed(codes.clone(), 1)) != digest(Packed(codes, 2))
    assert digest(Packed(codes, 1)) != digest(Packed(codes + 1, 1))


def test_views_of_one_tensor_are_read_once_each():
    rows = list(torch.randn(1500, 3, 64, 64))
    begin = time.perf_counter()
    assert digest(rows) != digest(rows[:-1] + [rows[-1] + 1])
    assert time.perf_counter() - begin < 5


def test_small_file_counts_by_its_content_wherever_it_lies(tmp_path):
    digests = []
    for folder, content in (("a", "x,1"), ("b", "x,1"), ("c", "x,2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "table.csv").write_text(content)
        digests.append(digest({"root": str(tmp_path / folder), "table": tmp_path / folder / "table.csv"}))
    assert digests[0] == digests[1] != digests[2]
    known = [str(tmp_path / folder / "table.csv") for folder in "ac"]
    assert digest(known[0], known_files=known) == digest(known[1], known_files=known)


def test_file_named_in_code_counts_by_its_content(tmp_path):
    (tmp_path / "table.csv").write_text("1")
    source = f"def f(x): return x + float(open({str(tmp_path / 'table.csv')!r}).read())"
    before = digest(cell(source, "f"))
    (tmp_path / "table.csv").write_text("2")
    assert digest(cell(source, "f")) != before


def test_data_set_counts_by_rows_order_and_transform():
    def rows(values=(1, 2, 3), label=0):
        return datasets.Dataset.from_dict({"x": list(values), "label": [label] * len(values)})

    same = digest(rows())
    assert digest(rows()) == same
    others = [rows((1, 2, 4)), rows(label=1), rows().select([2, 1, 0]), rows().with_format("torch")]
    others += [
        rows().with_transform(cell(f"def f(b): return {{'x': [v + {k} for v in b['x']]}}", "f")) for k in (1, 2)
    ]
    assert len({same, *map(digest, others)}) == 7


def test_unhashable_value_is_named_and_has_the_stand_in():
    class Rows:
        def __init__(self, k):
            self.k, self.rows = k, (i for i in ())

    with pytest.raises(Undigestible, match="generator"):
        digest(Rows(1))
    named = []
    first, again, other = (digest(Rows(k), unknown="one", on_unknown=named.append) for k in (1, 1, 2))
    assert first == again != other and "generator" in str(named[0])
    assert digest(Rows(1), unknown="two") != first


def test_object_that_cannot_be_taken_apart_is_told_with_the_type_of_its_error():
    class Locked:
        __slots__ = ()

        def __reduce_ex__(self, protocol):
            raise KeyError("no")

    with pytest.raises(Undigestible, match=r"Locked \(KeyError: 'no'\)") as told:
        ValueDigest()(Locked())
    assert isinstance(told.value.__cause__, KeyError)
