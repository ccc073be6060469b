"""Cutting models: prefix and suffix give the model's own answers, and the model stays the user's."""

import copy
import pickle

import pytest
import torch
from support import zoo
from support.chains import assert_replays

from hf_freezecache import BlockChain
from hf_freezecache.model.errors import ChainError

FAMILIES = pytest.mark.parametrize("name", list(zoo.FAMILIES))


def rng_states():
    return torch.get_rng_state().clone()


@FAMILIES
def test_every_cut_reproduces_logits_bit_for_bit(name):
    model = zoo.make(name)
    chain = BlockChain.from_model(model)
    assert len(chain) == zoo.BLOCKS[name]
    # Another batch, of another size than the probe's two rows.
    for rows in (1, 5):
        assert_replays(chain, zoo.pixels(model, rows))


@pytest.mark.parametrize("name", ["vit", "beit_shared", "swin", "convnext", "resnet"])
def test_every_cut_reproduces_logits_of_a_training_model(name):
    """The prefix runs in eval mode although the model trains, and leaves every module's mode alone."""
    model = zoo.make(name)
    chain = BlockChain.from_model(model)
    x = zoo.pixels(model)
    expected = chain.prefix({"pixel_values": x}, 2)
    model.train()
    next(iter(model.modules())).training = True
    modes = [module.training for module in model.modules()]
    assert torch.equal(chain.prefix({"pixel_values": x}, 2), expected)
    assert [module.training for module in model.modules()] == modes


def test_timm_vit_reproduces_logits_bit_for_bit():
    model = zoo.timm_vit()
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    chain = BlockChain.from_model(model, blocks=zoo.TIMM_BLOCKS, probe={"x": x[:2] + 1})
    assert chain.names == zoo.TIMM_BLOCKS
    assert_replays(chain, x)


def test_text_model_with_named_blocks_reproduces_logits_bit_for_bit():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=5
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    batch = {
        "input_ids": torch.randint(1, 50, (4, 7)),
        "attention_mask": torch.arange(7)[None] < torch.tensor([7, 3, 5, 1])[:, None],
    }
    blocks = ["bert.embeddings", *(f"bert.encoder.layer.{number}" for number in range(3))]
    chain = BlockChain.from_model(model, blocks=blocks, probe=batch)
    with torch.no_grad():
        expected = model(**batch).logits
        for cut in range(1, 5):
            feature = chain.prefix(batch, cut)
            with chain.replay(cut):
                replayed = model(**{**batch, "input_ids": feature}).logits
            assert torch.equal(replayed, expected), f"cut {cut}"
    assert chain.layout(2).grid is None and chain.layout(2).special_tokens == 0


def test_plain_module_reproduces_logits_bit_for_bit():
    model = zoo.ConvNet().eval()
    chain = BlockChain.from_model(model, blocks=zoo.CONVNET_BLOCKS)
    # No probe was given and none can be made up: the first inputs are the proof.
    assert_replays(chain, torch.randn(4, 3, 8, 8))


def test_inputs_of_another_size_are_traced_again():
    model = zoo.make("resnet")
    chain = BlockChain.from_model(model)
    assert_replays(chain, torch.randn(3, 3, 48, 80))
    assert chain.layout(1).grid == (12, 20)


def test_keyword_and_positional_input_both_replay():
    model = zoo.make("vit")
    chain = BlockChain.from_model(model)
    x = zoo.pixels(model)
    with torch.no_grad():
        expected, feature = model(x).logits, chain.prefix({"pixel_values": x}, 2)
        with chain.replay(2):
            assert torch.equal(model(feature).logits, expected)
            assert torch.equal(model(pixel_values=feature).logits, expected)
            labels = torch.tensor([0, 1, 2])
            assert model(pixel_values=feature, labels=labels).loss.ndim == 0


# The model stays as it was


@FAMILIES
def test_state_dict_unchanged_by_chain_and_replay(name):
    model = zoo.make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chain = BlockChain.from_model(model)
    x = zoo.pixels(model)
    with torch.no_grad():
        feature = chain.prefix({"pixel_values": x}, 2)
        with chain.replay(2):
            model(feature)
            assert list(model.state_dict()) == list(before)
    chain.freeze(2)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_model_pickles_copies_and_saves_after_replay(tmp_path):
    model = zoo.make("vit")
    x = zoo.pixels(model)
    chain = BlockChain.from_model(model)
    chain.freeze(2)
    with torch.no_grad():
        expected, feature = model(x).logits, chain.prefix({"pixel_values": x}, 2)
        with chain.replay(2):
            model(feature)
        model.save_pretrained(tmp_path)
        clones = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model), type(model).from_pretrained(tmp_path)]
        for clone in clones:
            assert torch.equal(clone.eval()(x).logits, expected)


def own_forwards(model):
    return {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in module.__dict__}


@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("failing", [False, True])
def test_instance_forwards_restored_after_replay(cut, failing):
    """An earlier instance-level forward (accelerate puts one on the model and on modules) is used and comes back."""
    model = zoo.make("vit")
    calls = []

    def hooked(module):
        original = module.forward

        def forward(*args, **kwargs):
            calls.append(module)
            return original(*args, **kwargs)

        module.forward = forward

    hooked(model)
    hooked(model.vit.layers[1])
    hooked(model.vit.layers[2])
    before = own_forwards(model)
    chain = BlockChain.from_model(model)
    feature = chain.prefix({"pixel_values": zoo.pixels(model)}, cut)
    calls.clear()
    try:
        with chain.replay(cut), torch.no_grad():
            assert own_forwards(model) != before
            model(pixel_values=feature)
            if failing:
                raise OSError("in the middle of a replay")
    except OSError:
        assert failing
    assert own_forwards(model) == before
    # The suffix went through its own hooks, the bypassed prefix did not.
    expected = [model, *([model.vit.layers[1]] if cut < 3 else []), *([model.vit.layers[2]] if cut < 4 else [])]
    assert calls == expected
    with chain.replay(cut), torch.no_grad():
        model(pixel_values=feature)


def test_positional_input_replays_through_an_earlier_forward_without_a_signature():
    model = zoo.make("vit")
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    assert_replays(BlockChain.from_model(model), zoo.pixels(model))


def test_accelerate_hook_survives_replay():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        count = 0

        def pre_forward(self, module, *args, **kwargs):
            type(self).count += 1
            return args, kwargs

    model = zoo.make("vit")
    add_hook_to_module(model.vit.layers[0], Count())
    add_hook_to_module(model.vit.layers[1], Count())
    chain = BlockChain.from_model(model)
    x = zoo.pixels(model)
    assert_replays(chain, x, cuts=[0, 1, 2, 3])
    Count.count = 0
    with torch.no_grad():
        model(x)
    assert Count.count == 2


def test_nested_replay_is_an_error():
    chain = BlockChain.from_model(zoo.make("vit"))
    with chain.replay(2):
        with pytest.raises(RuntimeError, match="already"):
            with chain.replay(1):
                pass
    with chain.replay(1):
        pass
    assert own_forwards(chain.model) == {}


def test_replay_of_a_suffix_keeps_no_prefix_activation():
    """The bypassed blocks do not compute: their parameters may hold anything."""
    model = zoo.make("vit")
    chain = BlockChain.from_model(model)
    x = zoo.pixels(model)
    with torch.no_grad():
        expected, feature = model(x).logits, chain.prefix({"pixel_values": x}, 3)
        for parameter in chain.prefix_parameters(3).values():
            parameter.fill_(float("nan"))
        with chain.replay(3):
            assert torch.equal(model(feature).logits, expected)


@FAMILIES
def test_finding_proving_and_running_leave_generators_alone(name):
    model = zoo.make(name).train()
    x = zoo.pixels(model)
    torch.manual_seed(5)
    before = rng_states()
    chain = BlockChain.from_model(model)
    chain.prove({"pixel_values": x}, 1)
    chain.prefix({"pixel_values": x}, 2)
    chain.layout(1)
    chain.freeze(1)
    assert torch.equal(rng_states(), before)


# What cannot be cut


class Collects(torch.nn.Module):
    """What every layer gives is added at the end."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.head = torch.nn.Linear(3, 2)

    def forward(self, x):
        collected = []
        for layer in self.layers:
            x = layer(x).relu()
            collected.append(x)
        return self.head(sum(collected).mean((2, 3)))


def test_many_skip_connections_over_the_cut_name_the_block():
    model, blocks = Collects().eval(), [f"layers.{number}" for number in range(5)]
    with pytest.raises(ChainError, match=r"'layers.4' \(cut 4\): 4 tensors cross it.*skip connection"):
        BlockChain.from_model(model, blocks=blocks, probe={"x": torch.randn(2, 3, 8, 8)})
    # Without a probe the proof comes with the first inputs, and never lets the wrong cut pass.
    chain = BlockChain.from_model(model, blocks=blocks)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ChainError, match=r"\(cut 4\).*skip connection"):
        chain.prefix({"x": x}, 4)
    assert own_forwards(model) == {}
    assert_replays(chain, x, cuts=[0, 1, 2, 3])


def test_a_skip_connection_over_the_cut_crosses_it_too():
    chain = BlockChain.from_model(zoo.SkipNet().eval(), blocks=zoo.CONVNET_BLOCKS)
    assert_replays(chain, torch.randn(2, 3, 8, 8), cuts=[0, 1, 2, 3])  # the head gets the sum: one tensor
    assert [chain.crossing(cut) for cut in (1, 2, 3)] == [1, 2, 1]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["stem", "second", "first"], "order"),
        (["stem", "third"], "no module 'third'"),
        (["stem", "first", "first.0"], "'first.0' is inside 'first'"),
        (["stem", "first", "stem"], "twice"),
        ([], "empty"),
        ("stem", "list of module names"),
    ],
)
def test_wrong_blocks_are_refused_by_name(blocks, message):
    with pytest.raises(ChainError, match=message):
        BlockChain.from_model(zoo.ConvNet(), blocks=blocks, probe={"x": torch.randn(2, 3, 8, 8)})


@pytest.mark.parametrize("cut", [-1, 5, 1.0, True, "2", None])
def test_cut_out_of_range_is_refused(cut):
    chain = BlockChain.from_model(zoo.make("vit"))
    calls = [chain.freeze, chain.layout, lambda c: chain.prefix({"pixel_values": None}, c)]
    for call in calls:
        with pytest.raises(ValueError, match="0 to 4"):
            call(cut)
    with pytest.raises(ValueError, match="0 to 4"):
        with chain.replay(cut):
            pass


def test_batch_without_the_main_input_is_refused():
    chain = BlockChain.from_model(zoo.make("vit"))
    with pytest.raises(ChainError, match="pixel_values"):
        chain.prove({"images": torch.randn(2, 3, 16, 16)}, 1)
    with chain.replay(1), pytest.raises(ValueError, match="pixel_values"):
        chain.model(labels=torch.zeros(2))


class Reorders(zoo.ConvNet):
    """Between stem and head, rows are in another order."""

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x).flip(0))).flip(0).mean((2, 3)))


class LooksAround(zoo.ConvNet):
    """A sample's feature depends on the samples beside it."""

    def forward(self, x):
        stem = self.stem(x)
        return self.head(self.second(self.first(stem - stem.mean(0))).mean((2, 3)))


class Halves(zoo.ConvNet):
    """Two rows for each sample; the first rows of all samples come before the second ones."""

    def forward(self, x):
        both = self.second(self.first(self.stem(torch.cat([x, x + 1]))))
        return self.head(both.mean((2, 3))).unflatten(0, (2, -1)).mean(0)


@pytest.mark.parametrize("build", [Reorders, LooksAround, Halves])
def test_feature_that_is_not_the_samples_own_is_refused(build):
    """A store would give samples the rows of others; on the batch itself, prefix and suffix are the model."""
    x = torch.randn(4, 3, 8, 8)
    chain = BlockChain.from_model(build().eval(), blocks=zoo.CONVNET_BLOCKS, probe={"x": x})
    with pytest.raises(ChainError, match="not one row for each sample.*mix samples up"):
        chain.prove({"x": x}, 2)
    with pytest.raises(ChainError, match="not one row for each sample"):
        chain.prefix({"x": x}, 2)


class Draws(zoo.ConvNet):
    """Between two blocks, a number is drawn that changes nothing, in evaluation as well."""

    def forward(self, x):
        first = self.first(self.stem(x))
        torch.rand([])
        return self.head(self.second(first).mean((2, 3)))


def test_random_numbers_that_are_drawn_before_the_cut_are_refused():
    """What they decide is not known: whether a layer runs, for example."""
    x = torch.randn(4, 3, 8, 8)
    chain = BlockChain.from_model(Draws().eval(), blocks=zoo.CONVNET_BLOCKS, probe={"x": x})
    with pytest.raises(ChainError, match="what runs before it draws random numbers in eval mode too"):
        chain.prove({"x": x}, 2)
    chain.prove({"x": x}, 1)


def test_rows_of_a_batch_are_those_of_its_main_input():
    """Whatever stands before it in the batch, a constant for example."""

    class Shifted(zoo.ConvNet):
        main_input_name = "x"

        def forward(self, table, x):
            return super().forward(x + table.mean())

    batch = {"table": torch.randn(7), "x": torch.randn(4, 3, 8, 8)}
    chain = BlockChain.from_model(Shifted().eval(), blocks=zoo.CONVNET_BLOCKS, probe=batch)
    chain.prove(batch, 2)
    with torch.no_grad():
        assert torch.equal(chain.suffix(chain.prefix(batch, 2), batch, 2), chain.model(**batch))


# From cut to cut


def assert_advances(chain, inputs):
    """From every cut to every later one: what the prefix gives there, bit for bit."""
    features = [chain.prefix(inputs, cut) for cut in range(len(chain) + 1)]
    for from_cut, feature in enumerate(features):
        for to_cut in range(from_cut, len(chain) + 1):
            advanced = chain.advance({**inputs, chain.main_input: feature}, from_cut, to_cut)
            assert torch.equal(advanced, features[to_cut]), f"from cut {from_cut} to {to_cut}"
            assert not advanced.requires_grad or from_cut == to_cut == 0


@FAMILIES
def test_advance_from_any_cut_to_any_later_one_is_the_prefix_bit_for_bit(name):
    model = zoo.make(name).train()
    modes = [module.training for module in model.modules()]
    assert_advances(BlockChain.from_model(model), {"pixel_values": zoo.pixels(model, rows=5)})
    assert [module.training for module in model.modules()] == modes and own_forwards(model) == {}


def test_advance_of_a_text_model_sees_the_attention_mask():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=5, **sizes)).eval()
    batch = {
        "input_ids": torch.randint(1, 50, (4, 7)),
        "attention_mask": torch.arange(7)[None] < torch.tensor([7, 3, 5, 1])[:, None],
    }
    blocks = ["bert.embeddings", *(f"bert.encoder.layer.{number}" for number in range(3))]
    chain = BlockChain.from_model(model, blocks=blocks, probe=batch)
    assert_advances(chain, batch)
    feature = chain.prefix(batch, 1)
    unmasked = chain.advance({"input_ids": feature, "attention_mask": torch.ones(4, 7, dtype=torch.bool)}, 1, 4)
    assert not torch.equal(unmasked, chain.prefix(batch, 4))


def test_advance_without_other_inputs_works_for_timm():
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    chain = BlockChain.from_model(zoo.timm_vit(), blocks=zoo.TIMM_BLOCKS, probe={"x": x[:2] + 1})
    assert_advances(chain, {"x": x})


class _SkipsSecond(zoo.ConvNet):
    """Can be cut before the second stage, and not after it."""

    def forward(self, x):
        first = self.first(self.stem(x))
        return self.head((self.second(first) + first).mean((2, 3)))


def test_advance_proves_both_cuts_before_use():
    model, x = _SkipsSecond().eval(), torch.randn(2, 3, 8, 8)
    chain = BlockChain.from_model(model, blocks=zoo.CONVNET_BLOCKS)
    feature = chain.prefix({"x": x}, 1)
    feature = chain.advance({"x": feature}, 1, 2)
    assert torch.equal(feature, chain.prefix({"x": x}, 2))
    assert torch.equal(chain.advance({"x": feature}, 2, 3), chain.prefix({"x": x}, 3))
    with torch.no_grad():  # the feature is what the first stage returns, for both of its readers
        expected = model(x)
        with chain.replay(2):
            assert torch.equal(model(feature), expected)


def test_advance_runs_the_blocks_in_between_alone():
    model = zoo.make("vit")
    chain = BlockChain.from_model(model)
    inputs = {"pixel_values": zoo.pixels(model)}
    expected, feature = chain.prefix(inputs, 3), chain.prefix(inputs, 2)
    with torch.no_grad():
        outside = [*chain.prefix_parameters(2).values(), *chain.blocks[3].modules[0].parameters()]
        for parameter in outside:
            parameter.fill_(float("nan"))
    assert torch.equal(chain.advance({"pixel_values": feature}, 2, 3), expected)


def test_advance_of_a_feature_of_another_size_is_refused():
    model = zoo.make("resnet")
    chain = BlockChain.from_model(model)
    feature = chain.prefix({"pixel_values": torch.randn(3, 3, 48, 48)}, 2)
    chain.trace({"pixel_values": zoo.pixels(model)})
    with pytest.raises(ChainError, match="traced on inputs whose feature at cut 2"):
        chain.advance({"pixel_values": feature}, 2, 3)
    with pytest.raises(ValueError, match="go back"):
        chain.advance({"pixel_values": feature}, 2, 1)


def test_a_model_whose_weights_are_nan_says_so():
    model = zoo.make("vit")
    chain = BlockChain.from_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ChainError, match="features or logits are NaN.*the weights have diverged"):
        chain.prove({"pixel_values": zoo.pixels(model)}, 2)
