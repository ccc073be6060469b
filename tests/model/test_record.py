"""The record of a run: values that views share, writes in place, what grows with the samples."""

import torch
from torch import nn

from hf_freezecache.model.record import answers_of, record_run


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 6), nn.Identity()

    def forward(self, x, labels=None):
        hidden = self.layer(x)
        turned = self.norm(hidden.transpose(0, 1))
        hidden += 1
        return {"loss": hidden.sum(), "logits": hidden, "seen": turned.shape[1]}


def record():
    torch.manual_seed(0)
    return record_run(Writes().eval(), {"x": torch.randn(2, 3, 4)}, samples=2)


def test_views_share_a_value_and_a_write_makes_another():
    whole, layer, norm = record().calls
    assert [call.name for call in (whole, layer, norm)] == ["", "layer", "norm"]
    (made,), (turned,) = layer.results.values(), norm.arguments.values()
    assert made.value == turned.value and made.place != turned.place
    after = whole.results[("logits",)]
    assert after.value[0] == made.value[0] and after.value[1] > made.value[1]


def test_dimensions_that_grow_with_the_samples_are_found():
    _, layer, norm = record().calls
    (made,), (turned,) = layer.results.values(), norm.results.values()
    assert (made.sample_dim, turned.sample_dim) == (0, 1)
    assert turned.shape_for(5) == (3, 5, 6) and made.is_feature


def test_answers_are_loss_and_logits_where_a_model_names_them():
    tensor = torch.zeros(2)
    named = {"loss": tensor, "start_logits": tensor, "hidden_states": (tensor, tensor)}
    assert set(answers_of(named)) == {("loss",), ("start_logits",)}
    assert set(answers_of((tensor, [tensor]))) == {(0,), (1, 0)}


def test_the_model_is_left_as_it_was():
    model = Writes().train()
    state = torch.get_rng_state()
    record_run(model, {"x": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))}, samples=2)
    assert model.training and "forward" not in model.layer.__dict__
    assert torch.equal(state, torch.get_rng_state())


class Pads(nn.Module):
    """Rows of the batch, and two more."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.cat([x, x.new_zeros(2, 4)]))[: len(x)]


def test_sizes_that_grow_out_of_proportion_are_not_made_of_samples():
    _, layer = record_run(Pads().eval(), {"x": torch.randn(2, 4)}, samples=2).calls
    (made,) = layer.results.values()
    assert made.shape == (4, 4) and made.sample_dim is None and not made.is_feature


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        # Tensors without a storage that go as soon as they are used.
        turned = [torch.sparse.mm(x.to_sparse(), torch.eye(4)) for _ in range(20)]
        return self.layer(torch.stack(turned).sum(0))


def test_tensors_without_a_storage_are_told_apart():
    found = record_run(Sparse().eval(), {"x": torch.randn(2, 4)}, samples=2)
    made = [operation.writes for operation in found.operations if operation.writes]
    assert sum(map(len, made)) == len(frozenset().union(*made))


def test_formula_of_flops_that_fails_is_told_and_costs_nothing(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise TypeError("no such arguments")

    caplog.set_level("DEBUG", logger="hf_freezecache")
    monkeypatch.setattr("hf_freezecache.distributed.Announcer.raises", ())
    monkeypatch.setattr("hf_freezecache.model.record.flop_registry", {torch.ops.aten.addmm: fail})
    found = record_run(Pads().eval(), {"x": torch.randn(2, 4)}, samples=2)
    assert sum(operation.flops for operation in found.operations) > 0
    told = [record for record in caplog.records if "addmm" in record.getMessage()]
    assert [record.exc_info[0] for record in told] == [TypeError]
