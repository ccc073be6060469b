"""Records without most of the work: the same as those of runs that do everything, or made by such runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from hf_freezecache import BlockChain
from hf_freezecache.model import record
from hf_freezecache.model.probes import first_rows
from tests.support.model_zoo import ENTRIES, QUICK


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch):
    monkeypatch.setattr(record, "FEW_PARAMETERS", 0)


def run(model, inputs, repeats):
    recorder = record._Recorder(model, inputs, repeats)
    recorder.run(model, inputs)
    return recorder


def in_words(recorder):
    """What a recorder has seen, storages numbered in the order in which they came."""
    numbers = {address: number for number, address in enumerate(recorder._kept)}

    def named(values):
        return sorted((numbers[address], version) for address, version in values)

    def described(specs):
        return [(path, named([s.value]), s.shape, s.dtype, s.device, s.place) for path, s in specs.items()]

    calls = [
        (c.name, c.nth, c.begin, c.end, c.first, c.last, described(c.arguments), described(c.results))
        for c in recorder.calls
    ]
    operations = [(named(o.reads), named(o.writes), o.flops, o.read_by_python) for o in recorder.operations]
    return named(recorder.inputs.values()), named(recorder.answers), calls, operations


@pytest.mark.parametrize("name", QUICK)
def test_records_without_repeated_work_are_those_of_all_of_it(name):
    entry = ENTRIES[name]
    inputs = first_rows(entry.make(), entry.inputs(rows=4, seed=1))
    everything = run(entry.make(), inputs, repeats=True)
    try:
        short = run(entry.make(), inputs, repeats=False)
    except record.ChainError as error:
        assert "ValueNeededError" in str(error)
        return
    if short.why_not is None:
        assert in_words(short) == in_words(everything)


def test_blocks_are_found_with_a_small_part_of_a_forward_pass():
    model = ViTForImageClassification(ViTConfig(image_size=64, patch_size=8, hidden_size=192, intermediate_size=768))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    with FlopCounterMode(display=False) as found:
        chain = BlockChain.from_model(model)
    assert len(chain) == 13
    # Two recorded runs, of two rows and of three: of each the stem, one of twelve layers, and the head.
    assert 0 < found.get_total_flops() < 0.4 * forward.get_total_flops()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.mix(x)


class Model(nn.Module):
    """Layers that repeat each other, and something that looks at what they give."""

    def __init__(self, look):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(3)), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.look, self.seen = look, []

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x * self.look(self, x))


def take_number(model, x):
    return x.sum().item()


def count(model, x):
    return len(x[x > 0.1])


def convert(model, x):
    return float(x.detach().numpy().sum())


def make_list(model, x):
    return sum(x.tolist()[0])


def print_it(model, x):
    return len(repr(x)) > 0


def catch(model, x):
    """The model's own code goes on without what it cannot have."""
    try:
        return x.sum().item()
    except Exception:
        return 0.0


def write_to_buffer(model, x):
    model.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return 1.0


def replace_buffer(model, x):
    model.mean = 0.9 * model.mean + 0.1 * x.mean(0)
    return 1.0


def append(model, x):
    model.seen.append(x)
    return 1.0


LOOKS = [take_number, count, convert, make_list, print_it, catch, write_to_buffer, replace_buffer, append]


@pytest.mark.parametrize("look", LOOKS)
def test_models_that_need_their_values_get_them(look):
    torch.manual_seed(0)
    model, x = Model(look).eval(), torch.randn(2, 4)
    twin = copy.deepcopy(model)
    found = record._record(model, {"x": x})
    expected = run(twin, {"x": x}, repeats=True)
    assert found._repeats is None  # the run that left work out was given up
    assert in_words(found) == in_words(expected)
    assert torch.equal(model.mean, twin.mean)
    assert len(model.seen) == len(twin.seen) and all(map(torch.equal, model.seen, twin.seen))


def test_what_does_not_depend_on_samples_is_computed():
    kept = {}

    def keep(model, x):
        table = torch.ones(2, 4)
        for layer in model.layers:
            table = layer.mix(table)
        kept["table"] = table
        return table

    model, x = Model(keep).eval(), torch.randn(2, 4)
    recorder = run(model, {"x": x}, repeats=False)
    assert recorder.why_not is None
    table = torch.ones(2, 4)
    for layer in model.layers:
        table = layer.mix(table)
    assert torch.equal(kept["table"], table)


def test_operations_that_draw_random_numbers_are_done():
    draws = []

    def draw(model, x):
        nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)
        nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)
        draws.append(torch.rand(()).item())
        return 1.0

    torch.manual_seed(0)
    model, x = Model(draw).eval(), torch.randn(2, 4)
    for repeats in (True, False):
        assert run(model, {"x": x}, repeats).why_not is None
    assert draws[0] == draws[1]


def test_methods_of_tensors_are_put_back():
    before = dict(vars(torch.Tensor))
    BlockChain.from_model(Model(take_number), ["layers.0", "layers.1"], {"x": torch.randn(2, 4)})
    assert dict(vars(torch.Tensor)) == before
