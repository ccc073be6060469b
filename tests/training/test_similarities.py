"""Fixed training samples, as every live block sees them."""

import pytest
import torch
from support.helpers import losses, pixel_dataset, run, tiny_resnet, tiny_vit, weights
from support.sized_images import GroupingTrainer, SizedImages
from support.token_rows import Pad, Texts, bert

from hf_freezecache import FreezeCacheConfig, FreezePolicy
from hf_freezecache.policies.cka import cka, gram
from hf_freezecache.training import similarities


class Reads(FreezePolicy):
    """Notes what it observes, and freezes at epoch 2."""

    observes = frozenset({"similarities"})

    def start(self, num_blocks):
        self.seen = {}

    def observe(self, moment, blocks):
        found = {block.index: block.similarities for block in blocks if block.similarities is not None}
        if found:
            self.seen[moment.step] = found

    def decide(self, moment):
        return 2 if moment.epoch >= 2 else 0


def trained(model, dataset, folder, policy, cache="always", **settings):
    return run(model, dataset, folder, FreezeCacheConfig(cache=cache, codec="fp32"), policy=policy, **settings)


def test_samples_are_read_at_the_start_of_every_epoch_at_least(tmp_path):
    policy = Reads()
    trained(tiny_vit(), pixel_dataset(64), tmp_path, policy)
    assert list(policy.seen) == [0, 8, 16, 24]
    assert [sorted(found) for found in policy.seen.values()] == [[0, 1, 2, 3]] * 2 + [[2, 3]] * 2
    assert all(value.shape == (32, 32) for found in policy.seen.values() for value in found.values())


def test_large_batches_are_read_in_between(tmp_path, monkeypatch):
    monkeypatch.setattr(similarities, "_SHARE", 0.5)
    policy, other = Reads(), Reads()
    trained(tiny_vit(), pixel_dataset(64), tmp_path, policy, cache="never")
    assert list(policy.seen)[:6] == [0, 3, 6, 8, 11, 14]
    trained(tiny_vit(), pixel_dataset(64), tmp_path, other, cache="never", gradient_accumulation_steps=2)
    assert list(other.seen)[:5] == [0, 2, 4, 6, 8]  # four steps an epoch, of sixteen samples each


@pytest.mark.parametrize(("model", "size"), [(tiny_vit, 16), (tiny_resnet, 32)])
def test_reading_changes_nothing_of_the_training(model, size, tmp_path):
    class Same(Reads):
        observes = frozenset()

    reading, plain = (
        trained(model(), pixel_dataset(size=size), tmp_path / policy.__name__, policy()) for policy in (Reads, Same)
    )
    assert losses(reading) == losses(plain)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(reading).items())
    read, without = (sum(p.flops for p in t.freeze_cache_report().phases) for t in (reading, plain))
    assert read > without and reading.state.total_flos > plain.state.total_flos


def test_what_is_read_is_the_model_at_that_moment(tmp_path):
    policy, model, dataset = Reads(), tiny_vit(), pixel_dataset(24)
    at_start = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, dataset, tmp_path, policy, cache="never", num_train_epochs=1)
    model.load_state_dict(at_start)
    with torch.no_grad():
        hidden = model.eval().vit(dataset[:]["pixel_values"], output_hidden_states=True).hidden_states
    read, order = policy.seen[0], None
    for index, value in enumerate(hidden):
        expected = gram(value)
        if order is None:  # rows are read in another order
            norms = read[0].diagonal()
            order = [int((expected.diagonal() - norm).abs().argmin()) for norm in norms]
        assert torch.allclose(read[index], expected[order][:, order], atol=1e-2), index
        assert cka(read[index], expected[order][:, order]) == pytest.approx(1.0, abs=1e-6)


def test_padding_of_texts_is_left_out(tmp_path):
    policy, wider = Reads(), Reads()
    for rule, width in ((policy, None), (wider, 20)):
        texts = {"data_collator": Pad(width=width), "remove_unused_columns": False, "num_train_epochs": 1}
        trained(bert(), Texts(40), tmp_path / str(width), rule, cache="never", **texts)
    for index, value in policy.seen[0].items():
        assert torch.allclose(value, wider.seen[0][index], atol=1e-3)


def test_images_of_several_sizes_are_those_of_one_size(tmp_path):
    policy = Reads()
    sizes = {"trainer_class": GroupingTrainer, "remove_unused_columns": False, "num_train_epochs": 1}
    trained(tiny_resnet(), SizedImages(70), tmp_path, policy, cache="never", **sizes)
    assert len(policy.seen[0][0]) > 1


class FewRows(Pad):
    """Does not take as many samples as are compared."""

    def __call__(self, rows):
        if len(rows) > 16:
            raise KeyError("too many rows")
        return super().__call__(rows)


def test_samples_that_cannot_be_collated_are_refused_with_the_type_of_the_error(tmp_path):
    texts = {"data_collator": FewRows(), "remove_unused_columns": False, "num_train_epochs": 1}
    with pytest.raises(ValueError, match=r"cannot be collated together: 'too many rows' \(KeyError\)") as caught:
        trained(bert(), Texts(40), tmp_path, Reads(), cache="never", **texts)
    assert isinstance(caught.value.__cause__, KeyError)
