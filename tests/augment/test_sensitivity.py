"""Which channels follow the augmentation: what is compared, what is not, and what comes out."""

import pytest
import safetensors.torch
import torch
from support.feature_maps import flip, identity, make_sensitivity, map_layout, measure, partly_outside, random_maps

from hf_freezecache.augment.sensitivity import SIMILARITIES, Sensitivity, SensitivityMeter
from hf_freezecache.model.layout import FeatureLayout

GRIDS = [(1, 1), (1, 6), (2, 2), (4, 4), (7, 7), (14, 14), (16, 16), (2, 9)]
both = pytest.mark.parametrize("method", SIMILARITIES)


# What is compared


@both
@pytest.mark.parametrize("grid", GRIDS)
def test_channel_that_follows_the_flip_has_similarity_1(grid, method):
    base = random_maps(grid=grid)
    view = base.flip(3)
    view[:, 1] = random_maps(grid=grid, seed=1)[:, 1]
    similarity = measure(base, view, flip(16, grid), method).similarity
    torch.testing.assert_close(similarity[[0, 2, 3]], torch.ones(3), rtol=0, atol=1e-5)
    assert similarity[1] < 0.75


@both
def test_noise_has_similarity_0(method):
    base, view = random_maps(64), random_maps(64, seed=1)
    similarity = measure(base, view, flip(64, (7, 7)), method).similarity
    assert similarity.abs().max() < 0.1


@both
def test_negated_channel_has_negative_similarity(method):
    base = random_maps()
    similarity = measure(base, -base, identity(16, (7, 7)), method).similarity
    assert (similarity < -0.3).all() and (similarity >= -1).all()


@both
def test_channel_that_ignores_the_flip_is_the_first_chosen(method):
    base = random_maps(channels=6)
    view = base.flip(3)
    view[:, 4] = base[:, 4]
    assert measure(base, view, flip(16, (7, 7)), method).choose(1).tolist() == [4]


@both
def test_constant_channel_has_similarity_1_if_it_stays_so(method):
    base = random_maps()
    base[:, 0], base[:, 1] = 5.1, 0.0
    view = base.flip(3)
    similarity = measure(base, view, flip(16, (7, 7)), method).similarity
    torch.testing.assert_close(similarity, torch.ones(4), rtol=0, atol=1e-3)
    # Another value by rounding is the same.
    view[:, 0] = torch.nextafter(view[:, 0], torch.tensor(9.0))
    similarity = measure(base, view, flip(16, (7, 7)), method).similarity
    torch.testing.assert_close(similarity, torch.ones(4), rtol=0, atol=1e-3)
    view[:, :2] += random_maps(seed=1)[:, :2]
    similarity = measure(base, view, flip(16, (7, 7)), method).similarity
    assert (similarity[:2] < 0.5).all() and (similarity[2:] > 0.999).all()


@both
def test_outlier_channel_does_not_change_the_others(method):
    base, view = random_maps(), random_maps(seed=1)
    view[:, :2] = base[:, :2] + 0.5 * view[:, :2]
    plain = measure(base, view, identity(16, (7, 7)), method).similarity
    base[:, 3], view[:, 3] = base[:, 3] * 1e4 - 3e4, view[:, 3] * 1e4 - 3e4
    similarity = measure(base, view, identity(16, (7, 7)), method).similarity
    assert torch.equal(similarity[:3], plain[:3])
    # Nor does its own scale or shift change its similarity.
    torch.testing.assert_close(similarity[3], plain[3], rtol=0, atol=1e-3)


def test_ssim_of_large_maps_is_the_usual_one():
    from torchmetrics.functional.image import structural_similarity_index_measure

    base = random_maps(grid=(20, 20), channels=1)
    view = base + 0.5 * random_maps(grid=(20, 20), channels=1, seed=1)
    mean, deviation = base.mean(), base.std(correction=0)
    _, image = structural_similarity_index_measure(
        (base - mean) / deviation + 3, (view - mean) / deviation + 3, data_range=6.0, return_full_image=True
    )
    similarity = measure(base, view, identity(16, (20, 20))).similarity
    torch.testing.assert_close(similarity, image.mean().view(1), rtol=0, atol=1e-5)


# What is not compared


@both
def test_garbage_where_nothing_of_the_base_is_shown_changes_nothing(method):
    base = random_maps()
    sources, view = partly_outside(base)
    view[:, 1] += 0.5 * random_maps(seed=1)[:, 1]
    before = measure(base, view, sources, method).similarity
    assert (before[[0, 2, 3]] > 0.9999).all() and before[1] < 0.99
    view[..., :3] = 100 * random_maps(seed=2)[..., :3]
    assert torch.equal(measure(base, view, sources, method).similarity, before)


def test_outside_is_the_mean_of_the_true_features_there():
    base = random_maps() * 3 + 7
    sources, view = partly_outside(base)
    view[..., :3] = random_maps(seed=1)[..., :3] - 2
    outside = measure(base, view, sources).outside
    torch.testing.assert_close(outside, view[..., :3].mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_outside_is_the_mean_of_the_channel_if_everything_is_shown():
    base = random_maps() + 3
    outside = measure(base, base, identity(16, (7, 7))).outside
    torch.testing.assert_close(outside, base.mean((0, 2, 3)))


@both
def test_only_positions_that_show_something_of_the_base_are_averaged(method):
    base, view = random_maps(64, grid=(4, 40)), random_maps(64, grid=(4, 40), seed=1)
    sources = identity(64, (4, 40))
    sources[:, :, 10:] = torch.nan
    # Three quarters outside: similarity 1 there would show.
    assert measure(base, view, sources, method).similarity.abs().max() < 0.15


@both
def test_view_that_shows_nothing_is_not_counted(method):
    base = random_maps()
    view, sources = base.clone(), identity(16, (7, 7))
    view[3], sources[3] = random_maps(seed=1)[3], 5.0
    sensitivity = measure(base, view, sources, method, previews=5)
    assert sensitivity.samples == 15
    torch.testing.assert_close(sensitivity.similarity, torch.ones(4), rtol=0, atol=1e-4)
    assert sensitivity.previews["sample_ids"].tolist() == [0, 1, 2, 4, 5]


def test_nothing_shown_at_all_is_an_error():
    meter = SensitivityMeter(map_layout())
    meter.update(random_maps(), random_maps(), identity(16, (7, 7)) + 5, range(16))
    with pytest.raises(ValueError, match="none of the views"):
        meter.result()


# How it is accumulated


@both
def test_batches_give_what_one_batch_gives(method):
    first = random_maps(8)
    # Equal values in both batches: the normalization, which the first batch decides, is then the same.
    base, noise = torch.cat([first, first.flip(0)]), random_maps(16, seed=1)
    view, sources = base.flip(3) + noise, flip(16, (7, 7))
    whole = measure(base, view, sources, method)
    meter = SensitivityMeter(map_layout(), method)
    for part in (slice(0, 8), slice(8, 16)):
        meter.update(base[part], view[part], sources[part], range(16)[part])
    torch.testing.assert_close(meter.result().similarity, whole.similarity, rtol=0, atol=1e-6)
    assert meter.result().samples == 16


@both
def test_split_batch_gives_what_a_whole_one_gives(method, monkeypatch):
    base, view, sources = random_maps(), random_maps(seed=1), flip(16, (7, 7))
    sources[:, :2] = torch.nan
    whole = measure(base, view, sources, method)
    monkeypatch.setattr("hf_freezecache.augment.sensitivity.CHUNK", 5 * 4 * 49)
    split = measure(base, view, sources, method)
    for name, value in whole.tensors().items():
        torch.testing.assert_close(split.tensors()[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_and_maps_of_the_same_data_give_the_same(method, dtype):
    base, view, sources = (
        random_maps(grid=(3, 5)).to(dtype),
        random_maps(grid=(3, 5), seed=1).to(dtype),
        flip(16, (3, 5)),
    )
    tokens = FeatureLayout((17, 4), (3, 5), 2, dtype)

    def to_tokens(maps):
        special = torch.full((16, 2, 4), 1e3, dtype=dtype)
        return torch.cat([special, maps.flatten(2).transpose(1, 2)], 1)

    expected = measure(base, view, sources, method, map_layout(grid=(3, 5), dtype=dtype))
    found = measure(to_tokens(base), to_tokens(view), sources, method, tokens)
    for name, value in expected.tensors().items():
        assert torch.equal(found.tensors()[name].nan_to_num(), value.nan_to_num()), name


# What comes out


def test_choose_takes_the_least_similar_sorted_and_the_first_of_equal_ones():
    sensitivity = make_sensitivity([0.5, 0.1, 0.5, 0.9, 0.5, 0.1])
    assert sensitivity.choose(0).tolist() == [] and sensitivity.choose(0).dtype == torch.int64
    assert sensitivity.choose(1).tolist() == [1]
    assert sensitivity.choose(4).tolist() == [0, 1, 2, 5]
    assert sensitivity.choose(6).tolist() == list(range(6))
    assert make_sensitivity([0.5] * 300).choose(200).tolist() == list(range(200))


@pytest.mark.parametrize("count", [-1, 7])
def test_choose_refuses_other_counts(count):
    with pytest.raises(ValueError, match="of 6 channels"):
        make_sensitivity([0.0] * 6).choose(count)


def test_previews_show_channels_over_the_range_of_similarity():
    base = random_maps(channels=11)
    scale = torch.arange(11.0).view(-1, 1, 1)
    sources, view = partly_outside(base)
    view = view + 0.2 * scale * random_maps(channels=11, seed=1)
    sensitivity = measure(base, view, sources, previews=3)
    shown = sensitivity.previews["channels"]
    assert shown.tolist() == sensitivity.ranking()[[0, 2, 4, 6, 8, 10]].tolist()
    assert shown[0] == sensitivity.choose(1)[0] and shown[-1] == 0
    assert sensitivity.previews["sample_ids"].tolist() == [0, 1, 2]
    assert torch.equal(sensitivity.previews["base"], base[:3, shown])
    assert torch.equal(sensitivity.previews["view"], view[:3, shown])
    warped = sensitivity.previews["warped"]
    assert warped[..., :3].isnan().all()
    torch.testing.assert_close(warped[..., 3:], base.flip(3)[:3, shown][..., 3:])


def test_previews_keep_their_values_when_the_batch_is_overwritten():
    base = random_maps()
    meter = SensitivityMeter(map_layout())
    meter.update(base, base, identity(16, (7, 7)), range(16))
    before = base[:4].clone()
    base.zero_()
    assert torch.equal(meter.result().previews["base"], before[:, meter.result().previews["channels"]])


@pytest.mark.parametrize("previews", [0, 2])
def test_tensors_round_trip_through_a_file(tmp_path, previews):
    base = random_maps()
    sources, view = partly_outside(base)
    sensitivity = measure(base, view, sources, previews=previews)
    safetensors.torch.save_file(sensitivity.tensors(), tmp_path / "s.safetensors")
    back = Sensitivity.from_tensors(safetensors.torch.load_file(tmp_path / "s.safetensors"))
    assert back.samples == sensitivity.samples == 16
    for name, value in sensitivity.tensors().items():
        torch.testing.assert_close(back.tensors()[name], value, rtol=0, atol=0, equal_nan=True)


# What is refused


def test_layout_without_grid_is_refused():
    with pytest.raises(ValueError, match="stored whole"):
        SensitivityMeter(FeatureLayout((5, 4), None, 0, torch.float32))


def test_unknown_similarity_is_refused():
    with pytest.raises(ValueError, match="ssim, cosine"):
        SensitivityMeter(map_layout(), "psnr")


@pytest.mark.parametrize("which", [0, 1])
def test_feature_that_is_not_finite_is_refused_with_its_sample(which):
    features = [random_maps(), random_maps()]
    features[which][3, 1, 2, 2] = torch.inf
    with pytest.raises(ValueError, match="sample 103 "):
        SensitivityMeter(map_layout()).update(*features, identity(16, (7, 7)), range(100, 116))


def test_batches_that_do_not_fit_are_refused():
    meter, base, sources = SensitivityMeter(map_layout()), random_maps(), identity(16, (7, 7))
    with pytest.raises(ValueError, match="shape"):
        meter.update(base[..., :6], base, sources, range(16))
    for arguments in (
        (base, base[:8], sources, range(16)),
        (base, base, sources[:, :6], range(16)),
        (base, base, sources, range(8)),
    ):
        with pytest.raises(ValueError, match="as many"):
            meter.update(*arguments)
