"""Frozen weights wait in the host's memory while steps run on features; here the host is the accelerator."""

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import assert_same_weights, losses, manual, messages, pixel_dataset, run, tiny_vit, weights
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.utils import logging

from hf_freezecache.distributed import Announcer, Group
from hf_freezecache.model.chain import BlockChain
from hf_freezecache.training import offloading, session
from hf_freezecache.training.offloading import Offloading, map_host


def map_cpu(values):
    host = torch.empty_like(values)
    return host, host.view_as(host)


@pytest.fixture
def made(monkeypatch):
    """The objects that trainings have made, by which the host's memory is told from the accelerator's."""
    objects = []

    class Recorded(Offloading):
        def __init__(self, *args):
            super().__init__(*args)
            objects.append(self)

    monkeypatch.setattr(session, "Offloading", Recorded)
    monkeypatch.setattr(offloading, "_READS_HOST", "cpu")
    monkeypatch.setattr(offloading, "map_host", map_cpu)
    return objects


def frozen(model, cut=2, **inputs):
    chain = BlockChain.from_model(model, probe=inputs or None)
    chain.freeze(cut)
    return chain


def make(chain, is_wanted=True):
    return Offloading(chain, Announcer(Group(), logging.get_logger(offloading.__name__)), is_wanted)


def size(chain, cut=2):
    return sum(parameter.nbytes for parameter in chain.prefix_parameters(cut).values())


def addresses(chain):
    return {name: parameter.data_ptr() for name, parameter in chain.model.named_parameters()}


class Watching(TrainerCallback):
    """What waits at steps and in evaluations, and what the model answers in the middle of an epoch."""

    def __init__(self, made):
        self.made, self.steps, self.evaluations, self.answers = made, [], [], []
        self.inputs = pixel_dataset(4)["pixel_values"]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(self.made[-1].waiting)
        with torch.no_grad():
            self.answers.append(model(pixel_values=torch.stack(list(self.inputs))).logits)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.evaluations.append(self.made[-1].waiting)


def train(path, callbacks=(), **settings):
    return run(
        tiny_vit(),
        pixel_dataset(),
        path,
        manual("1:2", **settings),
        callbacks=list(callbacks),
        eval_dataset=pixel_dataset(8, seed=1),
        eval_strategy="steps",
        eval_steps=6,
        num_train_epochs=3,
    )


def test_weights_wait_in_steps_on_features_alone_and_the_training_is_the_same(tmp_path, made):
    away, here = Watching(made), Watching(made)
    moved = train(tmp_path / "moved", [away])
    stayed = train(tmp_path / "stayed", [here], offload_frozen=False)
    expected = size(frozen(tiny_vit()))
    assert away.steps == [0] * 4 + [expected] * 8 and away.evaluations == [0, 0]
    assert here.steps == [0] * 12 and losses(moved) == losses(stayed)
    assert all(map(torch.equal, away.answers, here.answers))
    assert_same_weights(weights(moved), weights(stayed))
    assert made[0].waiting == 0 and not made[0]._places


def test_evaluations_from_a_store_leave_the_weights_where_they_are(tmp_path, made):
    seen = Watching(made)
    train(tmp_path, [seen], cache_eval=True)
    assert seen.evaluations[0] == size(frozen(tiny_vit()))


def test_what_waits_is_other_memory_with_the_same_values(made):
    chain = frozen(tiny_vit(), 3)
    before, places, own = weights_of(chain), addresses(chain), make(chain)
    for cut in (2, 3, 2):
        own.hold(cut)
        assert own.waiting == size(chain, cut)
        moved = {name for name, address in addresses(chain).items() if address != places[name]}
        assert moved >= set(chain.prefix_parameters(cut))
        assert_same_weights(weights_of(chain), before)
    own.hold(0)
    back = addresses(chain)
    assert own.waiting == 0 and not {place.view.data_ptr() for place in own._places.values()} & set(back.values())
    assert_same_weights(weights_of(chain), before)


def weights_of(chain):
    return {name: value.clone() for name, value in chain.model.state_dict().items()}


def test_embeddings_that_the_head_reads_too_stay(made):
    ids = torch.arange(10).reshape(2, 5)
    chain = frozen(GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=8, vocab_size=32)), 2, input_ids=ids)
    places, own = addresses(chain), make(chain)
    own.hold(2)
    moved = {name for name, address in addresses(chain).items() if address != places[name]}
    assert "transformer.wte.weight" not in moved and "transformer.wpe.weight" in moved and own.waiting


def test_weights_that_were_written_while_they_waited_are_brought_back(made):
    chain = frozen(tiny_vit())
    own, (name, parameter) = make(chain), next(iter(chain.prefix_parameters(2).items()))
    own.hold(2)
    with torch.no_grad():
        parameter.fill_(7)
    other = list(chain.prefix_parameters(2).values())[1]
    other.data = own_memory = torch.full_like(other, 3)  # as a copy of averaged weights is put in place
    own.hold(0)
    assert bool((parameter == 7).all()), name
    assert other.data_ptr() == own_memory.data_ptr()


def test_quantized_and_shared_memory_stays(made):
    class Quantized(torch.nn.Parameter):
        """A parameter that keeps more than its values."""

    chain = frozen(tiny_vit())
    layer, other = (chain.model.vit.layers[0].mlp.fc1, chain.model.vit.layers[0].mlp.fc2)
    layer.weight = Quantized(layer.weight.data, requires_grad=False)
    flat = torch.zeros(other.weight.numel() + 1)
    other.weight.data = flat[1:].view_as(other.weight)
    own, places = make(chain), addresses(chain)
    own.hold(2)
    for stays in (layer.weight, other.weight):
        (name,) = [name for name, parameter in chain.model.named_parameters() if parameter is stays]
        assert addresses(chain)[name] == places[name]
    assert own.waiting == size(chain) - layer.weight.nbytes - other.weight.nbytes


def refuse(values):
    raise RuntimeError("out of memory")


def lie(values):
    host = torch.empty_like(values)
    return host, torch.zeros_like(values)


@pytest.mark.parametrize(("maps", "why"), [(refuse, "out of memory"), (lie, "does not read the host's memory")])
def test_without_such_memory_everything_stays_and_the_training_goes_on(tmp_path, made, monkeypatch, caplog, maps, why):
    done = []

    def second_fails(values):
        done.append(values)
        return maps(values) if len(done) > 1 else map_cpu(values)

    monkeypatch.setattr(offloading, "map_host", second_fails)
    seen = Watching(made)
    moved = train(tmp_path / "moved", [seen])
    assert messages(caplog).count("The frozen weights stay in the accelerator's memory") == 1 and why in caplog.text
    stayed = train(tmp_path / "stayed", [Watching(made)], offload_frozen=False)
    assert seen.steps == [0] * 12 and losses(moved) == losses(stayed)
    assert_same_weights(weights(moved), weights(stayed))


def test_nothing_moves_where_the_weights_are_on_the_host_already(tmp_path, monkeypatch):
    monkeypatch.setattr(offloading, "map_host", refuse)
    chain = frozen(tiny_vit())
    own, places = make(chain), addresses(chain)
    own.hold(2)
    assert own.waiting == 0 and addresses(chain) == places


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator that reads the host's memory")
def test_an_accelerator_reads_what_waits_and_its_memory_is_free():
    model = tiny_vit().cuda()
    chain = frozen(model, pixel_values=torch.rand(2, 3, 16, 16, device="cuda"))
    own, inputs, before = make(chain), torch.rand(2, 3, 16, 16, device="cuda"), torch.cuda.memory_allocated()
    with torch.no_grad():
        expected = model(pixel_values=inputs).logits
        own.hold(2)
        assert before - torch.cuda.memory_allocated() >= own.waiting == size(chain)
        assert all(parameter.is_cuda for parameter in model.parameters())
        assert torch.equal(model(pixel_values=inputs).logits, expected)
        assert_same_weights(
            {n: v.cpu() for n, v in model.state_dict().items()}, {n: v.cpu() for n, v in weights_of(chain).items()}
        )
        own.close()
        assert torch.equal(model(pixel_values=inputs).logits, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator that reads the host's memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_of_the_host_is_mapped_in_every_form(dtype):
    for values in (
        torch.rand(3, 4, 5, 6),
        torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.rand(()),
    ):
        there = values.to("cuda", dtype)
        host, view = map_host(there)
        host.copy_(there)
        assert view.is_cuda and host.is_pinned() and torch.equal(view, there) and view.stride() == there.stride()


def test_checkpoints_of_steps_in_which_weights_wait_hold_them(tmp_path, made):
    """Saving reads them where they wait; a training that is resumed from there is the uninterrupted one."""

    class Notes(TrainerCallback):
        waiting = []

        def on_save(self, args, state, control, **kwargs):
            self.waiting.append(made[-1].waiting)

    settings = dict(num_train_epochs=3, save_strategy="steps", save_steps=6)
    moved = run(tiny_vit(), pixel_dataset(), tmp_path / "moved", manual("1:2"), callbacks=[Notes()], **settings)
    stay = manual("1:2", offload_frozen=False)
    stayed = run(tiny_vit(), pixel_dataset(), tmp_path / "stayed", stay, **settings)
    assert Notes.waiting[0] == size(frozen(tiny_vit()))
    saved = [load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("moved", "stayed")]
    assert_same_weights(*saved)
    checkpoint = str(tmp_path / "moved" / "checkpoint-6")
    resumed = run(
        tiny_vit(), pixel_dataset(), tmp_path / "moved", manual("1:2"), resume_from_checkpoint=checkpoint, **settings
    )
    assert_same_weights(weights(resumed), weights(stayed))
    assert losses(moved) == losses(stayed)
