"""Mixup, cutmix and noise: torchvision's on images, the same on features."""

import pytest
import torch
from torchvision.transforms import v2

from hf_freezecache.augment.mixing import Mixer, add_noise
from hf_freezecache.model.layout import FeatureLayout

CLASSES = 5
TOKENS = FeatureLayout((2 + 20, 6), (4, 5), 2, torch.float32)
MAP = FeatureLayout((6, 4, 5), (4, 5), 0, torch.float32)
VECTOR = FeatureLayout((6,), None, 0, torch.float32)
TEXT = FeatureLayout((7, 6), None, 0, torch.float32)


def batch_of(shape, rows=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(rows, *shape, generator=generator).to(dtype)
    return {"x": values, "labels": torch.randint(0, CLASSES, (rows,), generator=generator)}


def mix(batch, mixup=0.0, cutmix=0.0, layout=None, seed=0):
    torch.manual_seed(seed)
    mixed = Mixer(mixup, cutmix, CLASSES)(batch, "x", layout=layout)
    return mixed["x"], mixed["labels"]


def mix_by_torchvision(batch, transform, seed=0):
    torch.manual_seed(seed)
    return transform(batch["x"], batch["labels"])


def own_share(batch, soft):
    """How much of its own label a row keeps, read off a row whose neighbour has another class."""
    row = next(i for i in range(len(soft)) if batch["labels"][i] != batch["labels"][i - 1])
    return soft[row, batch["labels"][row]].item()


def seed_with_box(batch, layout):
    """A seed whose box neither vanishes nor covers all."""
    return next(s for s in range(99) if 0.2 < own_share(batch, mix(batch, cutmix=1.0, layout=layout, seed=s)[1]) < 0.8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layout", [None, MAP])
@pytest.mark.parametrize(
    "alphas, transform",
    [
        ((0.4, 0.0), v2.MixUp(alpha=0.4, num_classes=CLASSES)),
        ((0.0, 0.7), v2.CutMix(alpha=0.7, num_classes=CLASSES)),
        (
            (0.4, 0.7),
            v2.RandomChoice([v2.CutMix(alpha=0.7, num_classes=CLASSES), v2.MixUp(alpha=0.4, num_classes=CLASSES)]),
        ),
    ],
    ids=["mixup", "cutmix", "both"],
)
def test_images_and_maps_equal_torchvision(alphas, transform, layout, seed):
    batch = batch_of((3, 16, 12) if layout is None else layout.shape)
    mixed, soft = mix(batch, *alphas, layout=layout, seed=seed)
    following = torch.rand(1)
    expected, expected_soft = mix_by_torchvision(batch, transform, seed)
    assert torch.equal(mixed, expected) and torch.equal(soft, expected_soft)
    assert torch.equal(following, torch.rand(1))  # and as many numbers were drawn


@pytest.mark.parametrize("layout", [TOKENS, MAP, VECTOR, TEXT], ids=["tokens", "map", "vector", "text"])
def test_mixup_of_features_blends_every_value_by_the_labels_share(layout):
    batch = batch_of(layout.shape)
    mixed, soft = mix(batch, mixup=1.0, layout=layout)
    share = own_share(batch, soft)
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * batch["x"] + (1 - share) * batch["x"].roll(1, 0))


def test_mixup_draws_the_same_share_for_images_and_features():
    live = mix(batch_of((3, 8, 8)), mixup=0.4)[1]
    replayed = mix(batch_of(TOKENS.shape) | {"labels": batch_of((3, 8, 8))["labels"]}, mixup=0.4, layout=TOKENS)[1]
    assert torch.equal(live, replayed)


def test_cutmix_of_tokens_pastes_the_box_of_the_maps():
    batch = batch_of(TOKENS.shape)
    seed = seed_with_box(batch, TOKENS)
    mixed, soft = mix(batch, cutmix=1.0, layout=TOKENS, seed=seed)
    maps = batch["x"][:, 2:].transpose(1, 2).reshape(4, 6, 4, 5)
    expected, expected_soft = mix_by_torchvision({**batch, "x": maps}, v2.CutMix(num_classes=CLASSES), seed)
    assert torch.equal(mixed[:, 2:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(soft, expected_soft)


def test_cutmix_of_tokens_blends_special_tokens_by_the_area_pasted():
    batch = batch_of(TOKENS.shape)
    mixed, soft = mix(batch, cutmix=1.0, layout=TOKENS, seed=seed_with_box(batch, TOKENS))
    x = batch["x"]
    kept = (mixed[:, 2:] == x[:, 2:]).all(dim=-1)
    assert torch.equal(kept, kept[:1].expand_as(kept))
    share = kept[0].float().mean().item()
    assert share == pytest.approx(own_share(batch, soft))
    torch.testing.assert_close(mixed[:, :2], share * x[:, :2] + (1 - share) * x[:, :2].roll(1, 0))


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("layout", [None, TOKENS, MAP], ids=["images", "tokens", "map"])
def test_labels_are_float_and_sum_to_one(layout, alphas):
    batch = batch_of((3, 8, 8) if layout is None else layout.shape)
    for seed in range(5):
        soft = mix(batch, *alphas, layout=layout, seed=seed)[1]
        assert soft.shape == (4, CLASSES) and soft.dtype == torch.float32
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))


def test_both_alphas_choose_each_about_half_of_the_time():
    batch = batch_of(MAP.shape)
    torch.manual_seed(0)
    mixer = Mixer(1.0, 1.0, CLASSES)
    # Cutmix leaves every value as it was in one of the two rows.
    x, rolled = batch["x"], batch["x"].roll(1, 0)
    cut = [((m == x) | (m == rolled)).all() for m in (mixer(batch, "x", layout=MAP)["x"] for _ in range(400))]
    assert 160 < sum(cut) < 240


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("shape, grid, special", [((22, 6), (4, 5), 2), ((6, 4, 5), (4, 5), 0)])
def test_half_precision_features_keep_their_dtype(dtype, alphas, shape, grid, special):
    layout = FeatureLayout(shape, grid, special, dtype)
    batch = batch_of(shape, dtype=dtype)
    mixed, soft = mix(batch, *alphas, layout=layout)
    assert mixed.dtype == dtype and soft.dtype == torch.float32
    expected = mix({**batch, "x": batch["x"].float()}, *alphas, layout=layout)[0]
    torch.testing.assert_close(mixed.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
def test_batch_of_one_mixes_with_itself(alphas):
    batch = batch_of(TOKENS.shape, rows=1)
    mixed, soft = mix(batch, *alphas, layout=TOKENS)
    torch.testing.assert_close(mixed, batch["x"])
    torch.testing.assert_close(soft[0, batch["labels"][0]], torch.tensor(1.0))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("layout", [None, TOKENS, MAP], ids=["images", "tokens", "map"])
def test_given_batch_and_other_inputs_stay_as_they_were(layout, alphas, rows):
    batch = batch_of((3, 8, 8) if layout is None else layout.shape, rows)
    batch["mask"] = torch.arange(rows)
    before = {name: value.clone() for name, value in batch.items()}
    torch.manual_seed(0)
    mixed = Mixer(*alphas, CLASSES)(batch, "x", layout=layout)
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert mixed.keys() == batch.keys() and mixed["mask"] is batch["mask"]


@pytest.mark.parametrize("alphas", [(1, 0), (0, 1)], ids=["mixup", "cutmix"])
def test_integer_alphas_mix_as_floats_do(alphas):
    batch = batch_of((3, 8, 8))
    assert torch.equal(mix(batch, *alphas)[0], mix(batch, *map(float, alphas))[0])


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("layout", [None, MAP], ids=["images", "map"])
def test_channels_last_changes_no_value(layout, alphas):
    batch = batch_of((3, 8, 8) if layout is None else layout.shape)
    other = {**batch, "x": batch["x"].to(memory_format=torch.channels_last)}
    assert torch.equal(mix(batch, *alphas, layout=layout)[0], mix(other, *alphas, layout=layout)[0])


def test_labels_of_another_name_are_mixed():
    batch = batch_of((3, 8, 8))
    batch["classes"] = batch.pop("labels")
    mixed = Mixer(1.0, 0.0, CLASSES)(batch, "x", label_name="classes")
    assert mixed.keys() == batch.keys() and mixed["classes"].shape == (4, CLASSES)


@pytest.mark.parametrize("layout", [VECTOR, TEXT], ids=["vector", "text"])
@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_cutmix_without_a_grid_is_refused_whatever_is_drawn(layout, mixup):
    mixer = Mixer(mixup, 1.0, CLASSES)
    with pytest.raises(ValueError, match="no grid"):
        mixer.check(layout)
    for _ in range(8):
        with pytest.raises(ValueError, match="no grid"):
            mixer(batch_of(layout.shape), "x", layout=layout)


@pytest.mark.parametrize("layout", [VECTOR, TEXT], ids=["vector", "text"])
def test_grid_is_not_needed_by_mixup_alone(layout):
    batch, mixup = batch_of(layout.shape), Mixer(1.0, 0.0, CLASSES)
    with pytest.raises(ValueError, match="no grid"):
        Mixer(1.0, 1.0, CLASSES).check(layout)
    mixup.check(layout)
    torch.manual_seed(0)
    mixed = mixup(batch, "x", layout=layout)
    share = own_share(batch, mixed["labels"])
    assert 0 < share < 1
    torch.testing.assert_close(mixed["x"], share * batch["x"] + (1 - share) * batch["x"].roll(1, 0))


@pytest.mark.parametrize(
    "labels, reason",
    [
        (torch.full((4, CLASSES), 0.2), "soft already"),
        (torch.zeros(4), "float32"),
        (torch.zeros(4, dtype=torch.int32), "int32"),
        ([0, 1, 2, 3], "list"),
    ],
)
def test_labels_that_are_not_class_numbers_are_refused(labels, reason):
    with pytest.raises(ValueError, match=reason):
        mix({**batch_of((3, 8, 8)), "labels": labels}, mixup=1.0)


def test_missing_labels_are_refused():
    with pytest.raises(ValueError, match="no 'labels', only x"):
        mix({"x": batch_of((3, 8, 8))["x"]}, mixup=1.0)


@pytest.mark.parametrize(
    "values, layout",
    [
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None),
        (torch.zeros(4, 8, 8), None),
        (torch.zeros(3, 3, 8, 8), None),
        (torch.zeros(4, *MAP.shape), TOKENS),
    ],
    ids=["integers", "no channels", "too few rows", "another layout"],
)
def test_values_that_cannot_be_mixed_are_refused(values, layout):
    with pytest.raises(ValueError, match="floating point"):
        mix({**batch_of((3, 8, 8)), "x": values}, mixup=1.0, layout=layout)


@pytest.mark.parametrize(
    "alphas, classes, reason",
    [
        ((-0.1, 0.0), 5, "mixup_alpha"),
        ((0.0, -1.0), 5, "cutmix_alpha"),
        ((float("nan"), 0.0), 5, "mixup_alpha"),
        ((0.0, float("inf")), 5, "cutmix_alpha"),
        ((0.0, 0.0), 5, "nothing to mix"),
        ((1.0, 0.0), 1, "num_classes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(alphas, classes, reason):
    with pytest.raises(ValueError, match=reason):
        Mixer(*alphas, classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_noise_has_the_standard_deviation_asked_for(dtype):
    features = torch.ones(40, 50, 10, dtype=dtype)
    torch.manual_seed(0)
    noise = add_noise(features, 0.5) - features
    assert noise.dtype == dtype
    assert noise.float().std().item() == pytest.approx(0.5, rel=0.03)
    assert noise.float().mean().item() == pytest.approx(0, abs=0.02)
    assert torch.equal(features, torch.ones_like(features))


def test_noise_comes_from_the_global_generator():
    features = torch.zeros(3, 4)
    torch.manual_seed(1)
    expected = 0.2 * torch.randn(3, 4)
    torch.manual_seed(1)
    first, second = add_noise(features, 0.2), add_noise(features, 0.2)
    assert torch.equal(first, expected) and not torch.equal(first, second)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_noise_refuses_a_standard_deviation_that_is_none(sigma):
    with pytest.raises(ValueError, match="standard deviation"):
        add_noise(torch.zeros(2), sigma)
