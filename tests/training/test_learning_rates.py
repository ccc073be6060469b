"""Which block owns a parameter, and what its learning rate is multiplied by."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from support.helpers import CLASSES, assert_same_weights, make_args, manual, pixel_dataset, run, tiny_vit, weights
from support.policies import Answers
from support.token_rows import bert, gpt2
from timm.optim import param_groups_layer_decay
from torch import nn
from transformers import BertForMaskedLM, Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from hf_freezecache import FreezeCacheConfig, wrap_classifier
from hf_freezecache.model.chain import BlockChain
from hf_freezecache.policies import AutoPolicy, ComingFreeze, LinearPolicy, Moment, NonePolicy
from hf_freezecache.training.learning_rates import Fall, LearningRates, OptimizerError, check_anneal


def rates_of(model, probe=None, **settings):
    return LearningRates(BlockChain.from_model(model, probe=probe), FreezeCacheConfig(**settings))


def factors_of(model, rates):
    return {name: rates.factor(rates.block_of(parameter)) for name, parameter in model.named_parameters()}


def moment(num_epochs=10, steps=4):
    return Moment(0, num_epochs, 0, num_epochs * steps, 0, 4)


def test_a_fall_is_half_a_cosine_over_steps():
    fall = Fall(0, 8)
    assert [fall.factor(step) for step in (0, 4, 8, 9)] == [1.0, pytest.approx(0.5), 0.0, 0.0]
    assert fall.factor(2) == 0.5 * (1 + math.cos(math.pi * 2 / 8))
    later = Fall(4, 8)
    assert [later.factor(step) for step in (0, 3, 4, 6)] == [1.0, 1.0, 1.0, pytest.approx(0.5)]


@pytest.mark.parametrize("end", [8, 20, 40])
def test_scaled_falls_have_the_same_area(end):
    """That of half a cosine over the whole training, whenever the block freezes (FreezeOut's scaling)."""
    fall = Fall(0, end, height=40 / end)
    midpoints = sum(fall.factor(step) + fall.factor(step + 1) for step in range(40)) / 2
    assert midpoints == pytest.approx(0.5 * 40)


def test_falls_follow_from_the_freezes_that_are_known():
    rates = rates_of(tiny_vit(), anneal="cosine")
    coming = [ComingFreeze(3, 0, 5), ComingFreeze(2, 0, 1), ComingFreeze(4, 0, 10)]
    rates.expect(coming, moment(), 4)
    assert rates.falls == {0: Fall(0, 4), 1: Fall(0, 4), 2: Fall(0, 20)}  # the last one is beyond the training
    rates.expect([ComingFreeze(2, 0, 0), ComingFreeze(3, 2, 5)], moment(), 4)
    assert rates.falls == {2: Fall(8, 20)}  # blocks that are frozen from the start do not fall
    scaled = rates_of(tiny_vit(), anneal="cosine", anneal_scale=True)
    scaled.expect([ComingFreeze(2, 0, 5), ComingFreeze(3, 2, 5)], moment(), 4)
    assert scaled.falls == {0: Fall(0, 20, 2.0), 1: Fall(0, 20, 2.0), 2: Fall(8, 20)}


def test_without_annealing_nothing_falls():
    rates = rates_of(tiny_vit(), layer_decay=0.5)
    rates.expect([ComingFreeze(2, 0, 1)], moment(), 4)
    assert not rates.falls and rates.factor(4) == 1.0 and rates.factor(0) == 0.5**4


@pytest.mark.parametrize("name", ["vit", "resnet18"])
def test_layer_decay_gives_the_numbers_of_timm(name):
    """All but the last normalization of a ViT: timm counts it with the last block; BEiT, MAE and we with the head."""
    small = dict(img_size=32, depth=3, embed_dim=12, num_heads=2) if name == "vit" else {}
    bare = timm.create_model("vit_tiny_patch16_224" if name == "vit" else name, num_classes=CLASSES, **small)
    model = wrap_classifier(bare)
    probe = {"pixel_values": torch.randn(2, 3, 32, 32)}
    rates = rates_of(model, probe, layer_decay=0.7)
    ours = {parameter: rates.factor(rates.block_of(parameter)) for parameter in model.parameters()}
    theirs = {
        parameter: group["lr_scale"]
        for group in param_groups_layer_decay(bare, layer_decay=0.7)
        for parameter in group["params"]
    }
    different = {
        key for key, parameter in bare.named_parameters() if ours[parameter] != pytest.approx(theirs[parameter])
    }
    assert different == ({"norm.weight", "norm.bias"} if name == "vit" else set())
    assert all(ours[parameter] == 1.0 and theirs[parameter] == 0.7 for parameter in map(bare.get_parameter, different))


def test_parameters_outside_of_blocks_belong_to_what_they_freeze_with():
    model = tiny_vit()
    factors = factors_of(model, rates_of(model, layer_decay=0.5))
    assert factors["vit.embeddings.position_embeddings"] == factors["vit.embeddings.cls_token"] == 0.5**4
    assert factors["vit.layernorm.weight"] == factors["classifier.weight"] == 1.0


def tokens():
    return {"input_ids": torch.arange(2, 18).reshape(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


@pytest.mark.parametrize(
    ("make", "first", "head"),
    [
        (lambda: bert(BertForMaskedLM), "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
        (gpt2, "transformer.wpe.weight", "score.weight"),
    ],
    ids=["tied table", "positions"],
)
def test_tables_belong_to_the_stem_also_where_the_head_shares_them(make, first, head):
    model = make()
    rates = rates_of(model, tokens(), layer_decay=0.5)
    factors = factors_of(model, rates)
    assert factors[first] == 0.5 ** len(rates.chain) and factors[head] == 1.0


def test_what_a_loss_of_the_users_trains_belongs_to_the_head():
    rates = rates_of(tiny_vit(), layer_decay=0.5)
    assert rates.factor(rates.block_of(nn.Parameter(torch.zeros(1)))) == 1.0


class ByHand(TrainerCallback):
    """Sets the rates of groups before every step."""

    def __init__(self, rate, factor_of):
        self.rate, self.factor_of = rate, factor_of

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for block, group in enumerate(optimizer.param_groups):
            group["lr"] = self.rate * self.factor_of(block, state.global_step)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_optimizers_of_the_trainer_do_as_with_groups_made_by_hand(optim, tmp_path):
    settings = dict(lr_scheduler_type="constant", optim=optim, optim_args="momentum=0.9" if optim == "sgd" else None)
    falling = Fall(0, 8).factor
    config = dict(cache="never")
    ours = run(
        tiny_vit(), pixel_dataset(), tmp_path / "a", manual("2:2", anneal="cosine", layer_decay=0.5, **config),
        num_train_epochs=3, **settings,
    )  # fmt: skip
    model = tiny_vit()
    rates = rates_of(model)
    groups = [[p for p in model.parameters() if rates.block_of(p) == block] for block in range(5)]
    made, keywords = Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path, **settings), model)
    optimizer = made([{"params": group} for group in groups], **{"weight_decay": 0.0, **keywords})
    hand = ByHand(1e-3, lambda block, step: 0.5 ** (4 - block) * (falling(step) if block < 2 else 1.0))
    other = run(
        model, pixel_dataset(), tmp_path / "b", manual("2:2", **config), optimizers=(optimizer, None),
        callbacks=[hand], num_train_epochs=3, **settings,
    )  # fmt: skip
    assert_same_weights(weights(ours), weights(other))


#: Of the optimizers that can be made here; others may be installed beside the packages that the tests need.
REFUSED = {
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw_layerwise"),
    *("lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
}
ON_GPU = {"galore_adamw_8bit", "stable_adamw"}


@pytest.mark.parametrize("name", [str(name.value) for name in OptimizerNames])
def test_every_optimizer_of_the_trainer_follows_or_is_refused(name, tmp_path):
    low_rank = name.startswith(("galore", "apollo"))
    settings = dict(optim_target_modules="all-linear", optim_args="rank=4,update_proj_gap=1") if low_rank else {}
    if name in ON_GPU and not torch.cuda.is_available():
        pytest.skip("runs on a GPU only")
    model = tiny_vit()
    trainer = Trainer(model=model, args=make_args(tmp_path, optim=name, **settings))
    try:
        optimizer = trainer.create_optimizer()
    except (ImportError, ValueError, RuntimeError) as error:
        pytest.skip(f"a plain Trainer cannot make it here: {error}")
    rates = rates_of(model, layer_decay=0.5)
    if name not in REFUSED:
        rates.attach(optimizer)
        return
    with pytest.raises(OptimizerError, match="Choose an optimizer"):
        rates.attach(optimizer)


def test_a_step_that_accelerate_skips_is_none():
    model, head = tiny_vit(), "classifier.bias"
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(1))
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), scaler=scaler)
    rates, before = rates_of(model, layer_decay=0.5), weights(SimpleNamespace(model=model))
    rates.attach(optimizer)
    model.get_parameter(head).grad.fill_(float("inf"))
    rates.begin_step(0)
    optimizer.step()
    assert optimizer.step_was_skipped and len(optimizer.param_groups) == 1
    assert_same_weights(before, weights(SimpleNamespace(model=model)))
    scaler.update(1.0)
    model.get_parameter(head).grad.fill_(1.0)
    rates.begin_step(1)
    optimizer.step()
    moved = {name: float((before[name] - after).mean()) for name, after in model.state_dict().items()}
    assert moved[head] == pytest.approx(1.0) and moved["vit.embeddings.cls_token"] == pytest.approx(0.5**4, abs=1e-6)


class InBackward(torch.optim.Optimizer):
    """Steps when a gradient is done, as layer-wise GaLore."""

    def __init__(self, model):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: parameter.data.sub_(parameter.grad))
        super().__init__([nn.Parameter(torch.randn(4))], {"lr": 1.0})


def test_optimizers_that_step_in_the_backward_pass_are_refused():
    model = tiny_vit()
    with pytest.raises(OptimizerError, match="'vit.embeddings.cls_token' is updated in the backward pass"):
        rates_of(model, layer_decay=0.5).attach(InBackward(model))


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (SimpleNamespace(param_groups=[]), "no `torch.optim.Optimizer`"),
        (torch.optim.SGD([nn.Parameter(torch.ones(2), requires_grad=False)]), "holds no parameter that is trained"),
    ],
)
def test_what_is_no_optimizer_of_the_model_is_refused(optimizer, why):
    with pytest.raises(OptimizerError, match=f"{why}.*Choose an optimizer"):
        rates_of(tiny_vit(), layer_decay=0.5).attach(optimizer)


def test_an_optimizer_of_the_head_alone_is_fine():
    model = tiny_vit()
    rates = rates_of(model, layer_decay=0.5)
    rates.attach(torch.optim.SGD(model.classifier.parameters(), lr=0.1))
    rates.detach()


def test_rules_that_know_their_freezes_can_be_annealed():
    config = FreezeCacheConfig(anneal="cosine")
    check_anneal(LinearPolicy(), config, 4)
    check_anneal(NonePolicy(), config, 4)
    check_anneal(AutoPolicy(), config, 4)  # after its trial
    check_anneal(Answers(0), FreezeCacheConfig(), 4)
    with pytest.raises(ValueError, match="policy Answers does not know .* Set anneal_epochs .* override `changes`"):
        check_anneal(Answers(0), config, 4)
