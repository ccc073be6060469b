"""What a training costs: FLOPs against closed forms, and clocks that do not count twice."""

from types import SimpleNamespace

import pytest
import torch
from support import zoo
from support.helpers import manual, run
from support.images import picture_dataset, replayable
from support.sessions import session_of
from support.token_rows import Pad, Texts, bert, llama
from support.view_trainings import train
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_freezecache import BlockChain
from hf_freezecache.training.accounting import Accounts, Ledger
from hf_freezecache.training.flops import FlopMeter, counting_flops, measure_forward_flops, measure_training_flops


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 8, 3, padding=1, stride=2, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


def test_linear_flops_are_the_closed_form():
    model, x = Mlp(), torch.randn(5, 8)
    first, second = 2 * 8 * 16, 2 * 16 * 4
    assert measure_forward_flops(model, {"x": x}) == first + second
    # Backward: gradients of both weights, and of the second layer's input.
    assert measure_training_flops(model, {"x": x}) == 2 * first + 3 * second
    model.first.requires_grad_(False)
    assert measure_training_flops(model, {"x": x}) == first + 2 * second
    model.requires_grad_(False)
    assert measure_training_flops(model, {"x": x}) == first + second


def test_convolution_flops_are_the_closed_form():
    model, x = Convs(), torch.randn(3, 3, 8, 8)
    first, second = 2 * 3 * 9 * 4 * 64, 2 * 4 * 9 * 8 * 16
    assert measure_forward_flops(model, {"x": x}) == first + second
    trained = measure_training_flops(model, {"x": x})
    model.first.requires_grad_(False)
    frozen = measure_training_flops(model, {"x": x})
    assert trained == 2 * first + 3 * second
    assert frozen == first + 2 * second


def vit_forward_flops(layers, width, hidden, tokens, patches, patch, classes):
    """Multiplications and additions of a ViT's matrix products for one image."""
    embedding = 2 * patches * (3 * patch * patch) * width
    projections = 4 * 2 * tokens * width * width
    attention = 2 * 2 * tokens * tokens * width
    mlp = 2 * 2 * tokens * width * hidden
    return embedding + layers * (projections + attention + mlp) + 2 * width * classes


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_vit_flops_are_within_a_percent_of_the_analytic_count(implementation):
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=4,
        num_labels=5,
        attn_implementation=implementation,
    )
    model = ViTForImageClassification(config)
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    forward = vit_forward_flops(3, 48, 96, 65, 64, 4, 5)
    assert measure_forward_flops(model, pixels) == pytest.approx(forward, rel=0.01)
    # Backward costs twice the forward, but the images need no gradient; flash attention computes its scores again.
    embedding = 2 * 64 * 48 * 48
    again = 3 * 2 * 65 * 65 * 48 if implementation == "sdpa" else 0
    assert measure_training_flops(model, pixels) == pytest.approx(3 * forward - embedding + again, rel=0.01)


def test_attention_on_the_cpu_is_counted():
    query = torch.randn(2, 3, 40, 16)
    with counting_flops() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * 3 * 2 * (2 * 40 * 40 * 16)


def test_flops_are_per_sample_whatever_the_batch():
    model = zoo.make("vit")
    counts = {measure_training_flops(model, {"pixel_values": zoo.pixels(model, rows)}) for rows in (1, 2, 7)}
    assert len(counts) == 1


@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "convnext", "mobilenet"])
def test_measuring_leaves_gradients_buffers_modes_and_generators_alone(name):
    model = zoo.make(name).train()
    inputs = {"pixel_values": zoo.pixels(model), "labels": torch.tensor([0, 1, 2])}
    model(**inputs).loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert measure_training_flops(model, inputs) > 2 * measure_forward_flops(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[key], gradients[key]) for key in found)


@pytest.mark.parametrize("name", ["vit", "resnet", "swin"])
def test_freezing_and_replaying_take_fewer_flops_with_every_cut(name):
    model = zoo.make(name)
    chain = BlockChain.from_model(model)
    inputs = {"pixel_values": zoo.pixels(model)}
    forward = measure_forward_flops(model, inputs)
    live = [measure_training_flops(model, inputs)]
    replayed = []
    for cut in range(1, len(chain) + 1):
        chain.freeze(cut)
        live.append(measure_training_flops(model, inputs))
        features = chain.prefix(inputs, cut)
        with counting_flops() as counter:
            chain.prefix(inputs, cut)
        prefix = counter.get_total_flops() // 3
        with chain.replay(cut):
            replayed.append(measure_training_flops(model, {"pixel_values": features}))
        # Whatever the prefix does not do, the replayed step does.
        assert replayed[-1] == pytest.approx(live[-1] - prefix, rel=1e-6)
    assert live == sorted(live, reverse=True) and len(set(live)) == len(live)
    assert replayed == sorted(replayed, reverse=True) and len(set(replayed)) == len(replayed)
    assert live[-1] >= forward > replayed[-1] > 0


# The ledger


def seconds(ledger):
    return {(phase.cut, phase.mode): phase.seconds for phase in ledger.phases}


def test_nested_phases_count_their_own_seconds_only(clock):
    ledger = Ledger()
    ledger.begin(0, "live")
    clock(1)
    with ledger.phase(0, "eval"):
        clock(10)
        with ledger.phase(2, "build"):
            clock(100)
        clock(20)
    clock(2)
    ledger.end()
    clock(1000)
    assert seconds(ledger) == {(0, "live"): 3, (0, "eval"): 30, (2, "build"): 100}
    assert ledger.current is None


def test_phase_that_is_entered_again_goes_on(clock):
    ledger = Ledger()
    for _ in range(3):
        with ledger.phase(4, "replay") as phase:
            clock(5)
            phase.steps += 2
    assert len(ledger.phases) == 1
    assert (ledger.phases[0].seconds, ledger.phases[0].steps) == (15, 6)


def test_phases_are_listed_in_the_order_in_which_they_began(clock):
    ledger = Ledger()
    for cut, mode in [(0, "live"), (2, "build"), (2, "replay"), (0, "live"), (1, "eval")]:
        with ledger.phase(cut, mode):
            clock(1)
    assert [(phase.cut, phase.mode) for phase in ledger.phases] == [
        (0, "live"),
        (2, "build"),
        (2, "replay"),
        (1, "eval"),
    ]


def test_failing_block_closes_its_phase(clock):
    ledger = Ledger()
    ledger.begin(0, "live")
    with pytest.raises(KeyError):
        with ledger.phase(0, "eval"):
            clock(3)
            raise KeyError
    assert ledger.current.mode == "live"
    assert seconds(ledger)[0, "eval"] == 3


def test_end_all_closes_what_a_broken_training_left(clock):
    ledger = Ledger()
    ledger.begin(0, "live")
    ledger.begin(0, "eval")
    clock(2)
    ledger.end_all()
    clock(9)
    assert ledger.current is None and seconds(ledger) == {(0, "live"): 0, (0, "eval"): 2}
    with ledger.phase(0, "live"):
        clock(1)
    assert seconds(ledger)[0, "live"] == 1


def test_phase_closed_from_inside_is_not_closed_twice(clock):
    ledger = Ledger()
    ledger.begin(0, "live")
    with ledger.phase(0, "eval"):
        ledger.end_all()
    assert ledger.current is None


def test_state_continues_in_another_ledger(clock):
    import json

    ledger = Ledger()
    with ledger.phase(0, "live") as phase:
        clock(5)
        phase.flops, phase.steps, phase.epochs, phase.store_bytes = 1e15, 3, 1, 7
        saved = json.loads(json.dumps(ledger.state_dict()))
        clock(4)
    assert saved[0]["seconds"] == 5
    other = Ledger()
    other.load_state_dict(saved)
    with other.phase(0, "live") as phase:
        clock(2)
        phase.steps += 1
    assert (other.phases[0].seconds, other.phases[0].steps, other.phases[0].flops) == (7, 4, 1e15)
    assert ledger.phases[0].seconds == 9


def test_peak_memory_of_a_phase_sees_what_was_allocated_in_it():
    if torch.cuda.is_available():
        pytest.skip("counts the accelerator's memory")
    ledger = Ledger()
    with ledger.phase(0, "live"):
        pass
    with ledger.phase(2, "replay"):
        held = torch.ones(60_000_000 // 4)
        ledger.sample_memory()
    before, during = (phase.peak_memory_bytes for phase in ledger.phases)
    assert during - before >= 50_000_000
    del held


# Builds


def test_build_counts_what_the_prefix_ran_on(tmp_path):
    trainer, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=2, sensitivity_batches=2)
    build = next(phase for phase in trainer.freeze_cache_report().phases if phase.mode == "build")
    # 32 samples in three views, and two batches of 8 in two views to compare.
    assert build.flops == session_of(trainer).meter.per_sample("build", 2) * (32 * 3 + 2 * 8 * 2)


def test_build_phase_without_a_store_is_a_plan(clock):
    accounts = Accounts.__new__(Accounts)
    accounts.ledger, accounts.meter = Ledger(), SimpleNamespace(book_builds=lambda phase: None)
    with accounts.building(3) as phase:
        clock(2.0)
    accounts.decline(phase)
    with accounts.building(3) as phase:
        clock(5.0)
        phase.set_store(10)
    accounts.decline(phase)  # of the same cut: it stays a build
    with accounts.building(4):
        clock(1.0)  # a store was opened
    booked = [(phase.cut, phase.mode, phase.seconds) for phase in accounts.ledger.phases]
    assert booked == [(3, "plan", 2.0), (3, "build", 5.0), (4, "build", 1.0)]


def text_batch(width, rows=2):
    tokens = torch.randint(3, 64, (rows, width), generator=torch.Generator().manual_seed(width))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("make", [bert, llama])
def test_flops_of_a_text_follow_the_width_of_its_batch(make):
    model = make().eval()
    probe = text_batch(24)
    meter = FlopMeter(BlockChain.from_model(model, probe=probe), probe)
    whole = measure_forward_flops(model, probe)
    for width in (4, 12, 18, 40):
        counted = measure_forward_flops(model, text_batch(width)) / whole
        assert meter.relative(meter.width_of(text_batch(width))) == pytest.approx(counted, rel=1e-3)


def test_images_have_no_width():
    model = zoo.make("vit")
    pixels = {"pixel_values": zoo.pixels(model, 2)}
    meter = FlopMeter(BlockChain.from_model(model, probe=pixels), pixels)
    assert meter.width_of(pixels) is None and meter.relative(None) == 1.0


@pytest.mark.parametrize("cache", ["never", "always"])
def test_flops_of_a_training_on_texts_are_those_of_its_batches(cache, tmp_path):
    widths = []

    class Noting(Pad):
        def __call__(self, samples):
            batch = super().__call__(samples)
            widths.append(batch["input_ids"].shape[-1])
            return batch

    model, rows = bert(), Texts(32)
    trainer = run(model, rows, tmp_path, manual("0:3", cache=cache), data_collator=Noting(), num_train_epochs=2)
    mode = "live" if cache == "never" else "replay"
    [phase] = [phase for phase in trainer.freeze_cache_report().phases if phase.mode == mode]
    counted = 0.0
    for width in widths[-8:]:  # two epochs of four batches
        batch = {**text_batch(width, 8), "labels": torch.zeros(8, dtype=torch.int64)}
        chain = trainer._session.chain
        if cache == "never":
            counted += 8 * measure_training_flops(model, batch)
        else:
            features = chain.prefix(batch, 3)
            with chain.replay(3, features, batch["input_ids"]):
                counted += 8 * measure_training_flops(model, batch)
    assert phase.flops == pytest.approx(counted, rel=0.02)
