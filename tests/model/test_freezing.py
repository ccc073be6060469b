"""Frozen blocks are frozen, and training the suffix on features is training it on images."""

import contextlib

import pytest
import torch
from support import zoo
from torch.nn.functional import cross_entropy

from hf_freezecache import BlockChain
from hf_freezecache.model.errors import ChainError
from hf_freezecache.model.structure import find_tensor

FAMILIES = pytest.mark.parametrize("name", list(zoo.FAMILIES))
LABELS = torch.tensor([0, 1, 4])


def named(model, parameters):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in parameters}


@FAMILIES
def test_freeze_stops_gradients_of_the_prefix_only(name):
    model = zoo.make(name).train()
    chain = BlockChain.from_model(model)
    x = zoo.pixels(model)
    model(x, labels=LABELS).loss.backward()
    everything = {name for name, p in model.named_parameters() if p.grad is not None}
    frozen = chain.freeze(3)
    prefix = set(chain.prefix_parameters(3))
    assert named(model, frozen) == prefix
    blocks = {
        f"{path}.{key}"
        for block in chain.blocks[:3]
        for module in block.modules
        for path, found in model.named_modules()
        if found is module
        for key, _ in module.named_parameters()
    }
    assert blocks <= prefix
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (key not in prefix), key
        assert parameter.grad is None or key not in prefix, key
    model.zero_grad(set_to_none=True)
    model.train()
    chain.eval_prefix()
    model(x, labels=LABELS).loss.backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == everything - prefix


@FAMILIES
def test_frozen_prefix_is_deterministic_and_its_buffers_fixed(name):
    """Dropout and drop-path are off, BatchNorm uses and keeps its statistics: two passes in train mode agree."""
    model = zoo.make(name).train()
    chain = BlockChain.from_model(model)
    chain.freeze(3)
    before = {key: value.clone() for key, value in chain.prefix_buffers(3).items()}
    entered, features = chain.blocks[3].modules[0], []
    handle = entered.register_forward_pre_hook(
        lambda module, args, kwargs: features.append(find_tensor((args, kwargs)).clone()), with_kwargs=True
    )
    x = zoo.pixels(model)
    for _ in range(2):
        model.train()
        chain.eval_prefix()
        model(x)
    handle.remove()
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], chain.prefix({"pixel_values": x}, 3))
    assert all(torch.equal(value, before[key]) for key, value in chain.prefix_buffers(3).items())
    frozen = {id(module) for module in chain.prefix_modules(3)}
    for path, module in model.named_modules():
        if id(module) in frozen:
            assert not module.training, path
    assert model.training and all(module.training for module in chain.blocks[3].modules)


def test_frozen_batchnorm_statistics_stay_and_live_ones_move():
    model = zoo.make("resnet").train()
    chain = BlockChain.from_model(model)
    chain.freeze(3)
    before = {key: value.clone() for key, value in model.named_buffers()}
    frozen = set(chain.prefix_buffers(3))
    assert any(key.endswith("running_mean") for key in frozen)
    for _ in range(2):
        model.train()
        chain.eval_prefix()
        model(zoo.pixels(model) + 1)
    moved = {key for key, value in model.named_buffers() if not torch.equal(value, before[key])}
    assert moved == set(before) - frozen


def test_prefix_state_holds_parameters_and_buffers_of_the_prefix():
    chain = BlockChain.from_model(zoo.make("resnet"))
    parameters, buffers, state = chain.prefix_parameters(3), chain.prefix_buffers(3), chain.prefix_state(3)
    assert parameters and buffers and set(state) == set(parameters) | set(buffers)
    assert all(state[name] is parameter for name, parameter in parameters.items())
    assert all(state[name] is buffer for name, buffer in buffers.items())
    assert chain.prefix_state(0) == {}


def test_timm_stray_parameters_freeze_with_the_first_block():
    """timm keeps `cls_token` and `pos_embed` on the model and adds them between stem and first block."""
    model = zoo.timm_vit()
    probe = {"x": torch.randn(2, 3, 16, 16)}
    chain = BlockChain.from_model(model, blocks=zoo.TIMM_BLOCKS, probe=probe)
    for cut in (1, 3, 4):
        assert {"cls_token", "pos_embed"} <= set(chain.prefix_parameters(cut))
    assert chain.prefix_parameters(0) == {}
    assert not any(key.startswith(("norm", "head")) for key in chain.prefix_parameters(4))
    chain.freeze(2)
    model.train()
    chain.eval_prefix()
    model(probe["x"]).sum().backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None}
    assert trained and all(key.startswith(("blocks.1.", "blocks.2.", "norm.", "head.")) for key in trained)


def test_stray_parameters_are_found_where_requires_grad_is_off_and_leave_it_off():
    model = zoo.timm_vit()
    model.pos_embed.requires_grad_(False)
    chain = BlockChain.from_model(model, blocks=zoo.TIMM_BLOCKS, probe={"x": torch.randn(2, 3, 16, 16)})
    assert "pos_embed" in chain.prefix_parameters(1)
    assert not model.pos_embed.requires_grad and model.cls_token.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_dinov2_registers_and_embeddings_freeze_with_the_stem():
    chain = BlockChain.from_model(zoo.make("dinov2_registers"))
    stem = set(chain.prefix_parameters(1))
    assert any("register_tokens" in key for key in stem) and any("position_embeddings" in key for key in stem)


def test_shared_relative_position_bias_freezes_when_a_frozen_block_reads_it():
    model = zoo.make("beit_shared")
    chain = BlockChain.from_model(model)
    (table,) = [key for key, _ in model.named_parameters() if "relative_position_bias_table" in key]
    model.train()
    chain.freeze(2)
    model(zoo.pixels(model), labels=LABELS).loss.backward()
    parameter = dict(model.named_parameters())[table]
    # The frozen blocks compute with it: were it trained on, cached features would not be the model's any more.
    assert not parameter.requires_grad and parameter.grad is None


def test_unfreeze_restores_the_users_requires_grad():
    model = zoo.make("vit")
    model.vit.embeddings.requires_grad_(False)
    model.vit.layers[0].attention.requires_grad_(False)
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    chain = BlockChain.from_model(model)
    newly = chain.freeze(1)
    assert newly == []
    newly = chain.freeze(3)
    assert newly and all(before[key] for key in named(model, newly))
    assert chain.cut == 3
    chain.unfreeze()
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before
    assert chain.cut == 0
    chain.freeze(1)
    chain.unfreeze()
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before


def test_freezing_less_never_thaws():
    model = zoo.make("vit")
    chain = BlockChain.from_model(model)
    chain.freeze(3)
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert chain.freeze(1) == []
    assert chain.cut == 3
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == frozen


def test_freezing_everything_leaves_the_head():
    for name in ("vit", "resnet", "swin"):
        model = zoo.make(name)
        chain = BlockChain.from_model(model)
        chain.freeze(len(chain))
        live = {key for key, p in model.named_parameters() if p.requires_grad}
        assert any(key.startswith("classifier") for key in live)
        assert not any(".layers." in key or "embed" in key for key in live), live


# Training on features is training on images


def step(chain, cut, x, replay, seed=11):
    """One step with the prefix frozen, on images or on features: loss, gradients, buffers, generator state."""
    model = chain.model
    model.train()
    chain.eval_prefix()
    model.zero_grad(set_to_none=True)
    inputs = chain.prefix({chain.main_input: x}, cut) if replay else x
    with chain.replay(cut) if replay else contextlib.nullcontext(), chain.frozen_modes():
        torch.manual_seed(seed)
        output = model(**{chain.main_input: inputs})
        loss = cross_entropy(output if isinstance(output, torch.Tensor) else output.logits, LABELS)
        loss.backward()
        after = torch.get_rng_state()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found, {key: value.clone() for key, value in model.named_buffers()}, after


def assert_same_step(chain, x, cuts=None):
    model = chain.model
    for cut in range(1, len(chain) + 1) if cuts is None else cuts:
        chain.freeze(cut)
        saved = {key: value.clone() for key, value in model.state_dict().items()}
        loss, expected, buffers, state = step(chain, cut, x, replay=False)
        model.load_state_dict(saved)
        replayed_loss, replayed, replayed_buffers, replayed_state = step(chain, cut, x, replay=True)
        model.load_state_dict(saved)
        assert torch.equal(replayed_loss, loss), f"cut {cut}"
        assert replayed.keys() == expected.keys() and expected
        different = [key for key in expected if not torch.equal(replayed[key], expected[key])]
        assert not different, f"cut {cut}: {different[:3]}"
        assert all(torch.equal(replayed_buffers[key], buffers[key]) for key in buffers), f"cut {cut}"
        assert torch.equal(replayed_state, state), f"cut {cut}: other random draws"


@FAMILIES
def test_suffix_gradients_on_features_are_those_of_freeze_only(name):
    model = zoo.make(name)
    cuts = [1, 2, 9, 17] if name == "mobilenet" else None
    assert_same_step(BlockChain.from_model(model), zoo.pixels(model), cuts)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "beit", "swin"])
def test_gradients_with_activation_checkpointing_are_those_of_freeze_only(name):
    model = checkpointed(name, reentrant=False)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_same_step(BlockChain.from_model(model), zoo.pixels(model), cuts=[1, 2])


def test_reentrant_checkpointing_is_refused():
    """Under it the blocks behind a frozen one get no gradient at all, with or without a cache."""
    with pytest.raises(ChainError, match="use_reentrant"):
        BlockChain.from_model(checkpointed("vit", reentrant=True))


def checkpointed(name, reentrant):
    model = zoo.make(name)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def test_timm_gradients_on_features_are_those_of_freeze_only():
    """Dropout after the position embedding runs between stem and first block: it belongs to the prefix."""
    model = zoo.timm_vit(pos_drop_rate=0.2, proj_drop_rate=0.2, drop_path_rate=0.2)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert_same_step(BlockChain.from_model(model, blocks=zoo.TIMM_BLOCKS, probe={"x": x[:2]}), x)


def test_plain_module_gradients_on_features_are_those_of_freeze_only():
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert_same_step(BlockChain.from_model(zoo.ConvNet(), blocks=zoo.CONVNET_BLOCKS, probe={"x": x[:2]}), x)


class SharedDropout(zoo.ConvNet):
    """One dropout module runs after every block, so before and after a cut."""

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.first(self.drop(self.stem(x))))
        return self.head(self.drop(self.second(x)).mean((2, 3)))


class FunctionalDropout(zoo.ConvNet):
    """Dropout between blocks that follows the mode of the whole model."""

    def forward(self, x):
        x = torch.nn.functional.dropout(self.first(self.stem(x)), 0.5, self.training)
        return self.head(self.second(x).mean((2, 3)))


@pytest.mark.parametrize("build", [SharedDropout, FunctionalDropout])
def test_randomness_between_blocks_is_off_in_the_prefix(build):
    """Frozen means dropout off: what crosses the cut must not depend on whether it comes from images or a store."""
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    chain = BlockChain.from_model(build(), blocks=zoo.CONVNET_BLOCKS, probe={"x": x[:2]})
    assert_same_step(chain, x)


def test_freeze_of_a_model_that_never_ran_is_refused_or_takes_stray_parameters_later():
    model = zoo.timm_vit()
    chain = BlockChain.from_model(model, blocks=zoo.TIMM_BLOCKS)
    try:
        chain.freeze(2)
    except ChainError:
        return
    chain.prefix({"x": torch.randn(2, 3, 16, 16)}, 2)
    assert not model.pos_embed.requires_grad and not model.cls_token.requires_grad
