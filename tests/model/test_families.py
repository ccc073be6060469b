"""Declarations of the model families: which modules are the blocks of a model."""

import pytest
import torch
from support import zoo
from support.chains import assert_replays
from torch import nn

from hf_freezecache import BlockChain
from hf_freezecache.model.blocks import declared_blocks
from hf_freezecache.model.errors import ChainError
from hf_freezecache.model.families import FAMILIES, Family, block_groups


def groups_of(model: nn.Module, family: Family | None = None):
    base = getattr(model, model.base_model_prefix)
    return block_groups(base, family or FAMILIES[model.config.model_type])


@pytest.mark.parametrize("name", list(zoo.FAMILIES))
def test_declaration_names_every_block_of_its_family_once(name):
    model = zoo.make(name)
    base, groups = getattr(model, model.base_model_prefix), groups_of(model)
    assert len(groups) == zoo.BLOCKS[name]
    stem = FAMILIES[model.config.model_type].stem
    assert groups[0] == (stem, (stem,))
    paths = [path for _, members in groups for path in members]
    assert len(paths) == len(set(paths)) and all(name in members for name, members in groups)
    modules = [base.get_submodule(path) for path in paths]
    inside = [id(inner) for module in modules for inner in module.modules()]
    assert len(inside) == len(set(inside)), "blocks share a module or contain each other"


@pytest.mark.parametrize("name", list(zoo.FAMILIES))
def test_blocks_are_named_as_the_whole_model_names_them(name):
    model = zoo.make(name)
    blocks = declared_blocks(model)
    assert [block.name for block in blocks] == [f"{model.base_model_prefix}.{name}" for name, _ in groups_of(model)]
    assert all(model.get_submodule(block.name) in block.modules for block in blocks)


def test_every_declared_family_is_in_the_zoo():
    assert {zoo.make(name).config.model_type for name in zoo.FAMILIES} == set(FAMILIES)


def test_blocks_are_in_the_order_of_their_numbers_not_of_their_names():
    names = [name for name, _ in groups_of(zoo.make("mobilenet"))]
    assert names == ["conv_stem", *(f"layer.{number}" for number in range(16))]


def test_modules_at_the_beginning_of_a_stage_belong_to_its_first_block():
    groups = dict(groups_of(zoo.make("convnext")))
    assert groups["encoder.stages.1.layers.0"] == (
        "encoder.stages.1.downsampling_layer.0",
        "encoder.stages.1.downsampling_layer.1",
        "encoder.stages.1.layers.0",
    )
    assert groups["encoder.stages.0.layers.0"] == ("encoder.stages.0.layers.0",)
    assert groups["encoder.stages.1.layers.1"] == ("encoder.stages.1.layers.1",)


def test_module_at_the_end_of_a_stage_belongs_to_its_last_block():
    groups = dict(groups_of(zoo.make("swin")))
    assert groups["encoder.layers.0.blocks.1"] == ("encoder.layers.0.blocks.1", "encoder.layers.0.downsample")
    assert groups["encoder.layers.0.blocks.0"] == ("encoder.layers.0.blocks.0",)
    assert groups["encoder.layers.1.blocks.1"] == ("encoder.layers.1.blocks.1",)


@pytest.mark.parametrize("blocks", [("missing.*", "layers.*"), ("layers.*", "missing.*")])
def test_first_pattern_that_matches_is_used(blocks):
    names = [name for name, _ in groups_of(zoo.make("vit"), Family("embeddings", blocks))]
    assert names == ["embeddings", "layers.0", "layers.1", "layers.2"]


def test_pattern_matches_whole_paths_and_numbers_alone():
    base = nn.ModuleDict(
        {
            "stem": nn.Identity(),
            "layer": nn.ModuleDict({"0": nn.ModuleDict({"mlp": nn.Identity()}), "last": nn.Identity()}),
            "layers": nn.ModuleList([nn.Identity()]),
        }
    )
    assert block_groups(base, Family("stem", ("layer.*",))) == [("stem", ("stem",)), ("layer.0", ("layer.0",))]


@pytest.mark.parametrize("family", [Family("embeddings", ("blocks.*",)), Family("patch_embed", ("layers.*",))])
def test_declaration_that_does_not_fit_gives_no_blocks(family):
    assert groups_of(zoo.make("vit"), family) is None


def test_model_without_the_modules_of_its_family_is_looked_into():
    model = zoo.make("vit")
    del model.vit.embeddings
    assert declared_blocks(model) is None


def test_base_model_itself_has_the_same_blocks():
    model = zoo.make("vit")
    assert [block.name for block in declared_blocks(model.vit)] == [name for name, _ in groups_of(model)]


def test_model_of_no_declared_family_needs_a_batch_to_run_on():
    model = zoo.ConvNet().eval()
    assert declared_blocks(model) is None
    with pytest.raises(ChainError, match=r"ConvNet are found in a run.*probe=.*blocks="):
        BlockChain.from_model(model)
    chain = BlockChain.from_model(model, probe={"x": torch.randn(2, 3, 8, 8)})
    assert chain.names[0] == "stem"
    assert_replays(chain, torch.randn(3, 3, 8, 8))
