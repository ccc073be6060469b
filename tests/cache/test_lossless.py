"""Packed stores: the same rows in fewer bytes, wherever stores are made and read."""

import shutil
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from support.builds import Rows, build, collate, make_spec, on_every_process
from support.codec_cases import NAMES
from support.helpers import assert_same_weights, losses, make_args, manual, pixel_dataset, run, tiny_vit, weights
from support.images import OpaqueFlip, picture_dataset, replayable
from support.sessions import session_of
from torch.utils.data import DataLoader

from hf_freezecache import FeatureStore, FreezeCacheConfig, plan
from hf_freezecache.build.deepening import deepened, why_not_deepen
from hf_freezecache.build.feature_sources import ViewRun
from hf_freezecache.build.materialize import OverLimit, materialize, open_matching
from hf_freezecache.build.partial import PartialStore
from hf_freezecache.build.sizing import estimate_bytes, spec_bytes
from hf_freezecache.cache.lossless import LOSSLESS, blank_frames, largest_frame, pack_rows, packed_columns
from hf_freezecache.cache.manifest import Manifest, StoreError
from hf_freezecache.cache.mapped import PackedColumn
from hf_freezecache.cache.rows import split_batch
from hf_freezecache.cli import main as cli
from hf_freezecache.distributed import Group
from hf_freezecache.replay.collator import ReplayCollator, take_codes
from hf_freezecache.replay.dataset import ReplayDataset, SourceSwitch


class FlatRows(Rows):
    """Images of one colour, whose features repeat."""

    def __getitem__(self, row):
        return {"pixel_values": torch.full((3, self.size, self.size), row / 10), "labels": row % 5}


def flat_vit():
    """Without positions: of an image of one colour, every token is the same and packs well."""
    model = tiny_vit()
    torch.nn.init.zeros_(model.vit.embeddings.position_embeddings)
    return model


def pack(spec):
    """The same spec with packed rows."""
    return replace(spec, lossless=True, made_from={**spec.made_from, **LOSSLESS})


def both(model, folder, dataset=None, **settings):
    """A store and a packed one of the same samples."""
    plain = make_spec(model, folder, dataset, **settings)
    return materialize(plain, Group()), materialize(pack(plain), Group())


def assert_same_rows(first, second, count):
    generator = np.random.default_rng(0)
    for views in (None, *(np.full(count, view) for view in range(first.manifest.views + 1))):
        order = generator.permutation(count)
        one, other = first.read_rows(order, views), second.read_rows(order, views)
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]


# Frames


def test_rows_are_packed_and_unpacked_one_by_one():
    rows = np.random.default_rng(0).integers(0, 4, (7, 300), dtype=np.uint8)
    frames = pack_rows(rows)
    assert [pa.Codec("zstd").decompress(frame.as_buffer(), 300).to_pybytes() for frame in frames] == [
        row.tobytes() for row in rows
    ]
    # Several batches, one of them a slice and one empty.
    column = pa.chunked_array([frames.slice(2, 3), frames.slice(0, 0), frames])
    packed = PackedColumn(column, 300, "column 'base'")
    wanted = np.array([9, 0, 2, 3, 3, 8])
    assert np.array_equal(packed.take(wanted), np.concatenate([rows[2:5], rows])[wanted])
    assert len(packed) == 10 and packed.take(np.array([], dtype=np.int64)).shape == (0, 300)
    assert packed.frame_bytes == pytest.approx(sum(len(frame.as_py()) for frame in column) / 10)
    for outside in (10, -1):
        with pytest.raises(IndexError, match="there are 10"):
            packed.take(np.array([outside]))


@pytest.mark.parametrize("width", [1, 7, 128, 5000, 131072, 400000])
def test_no_frame_is_larger_than_the_largest(width):
    noise = np.random.default_rng(width).integers(0, 256, (3, width), dtype=np.uint8)
    assert max(len(frame.as_py()) for frame in pack_rows(noise)) <= largest_frame(width) <= width * 1.005 + 64


def test_blank_frames_take_their_mean():
    frames = blank_frames(6, 10.5)
    assert len(frames) == 6 and frames.buffers()[2].size == 63


def test_only_the_codes_of_rows_are_packed():
    columns = {name: (torch.uint8, 8) for name in ("base", "view_1", "view_12", "view_special_1", "geometry_1")}
    columns["special"] = (torch.float16, 8)
    assert packed_columns(columns, True) == {"base": 8, "view_1": 8, "view_12": 8}
    assert packed_columns(columns, False) == {}


# Stores


@pytest.mark.parametrize("codec", NAMES)
def test_packed_rows_are_those_of_a_plain_store(codec, tmp_path):
    plain, packed = both(tiny_vit(), tmp_path, codec=codec)
    assert_same_rows(plain, packed, 22)
    assert torch.equal(plain.read(range(22)), packed.read(range(22)))
    assert packed.manifest.lossless and not plain.manifest.lossless and packed.path != plain.path
    assert packed.bytes == sum(file.stat().st_size for file in packed.path.glob("*.arrow"))


def test_packed_store_is_smaller_and_reads_the_same_through_other_batches(tmp_path):
    plain, packed = both(flat_vit(), tmp_path, FlatRows(50), codec="fp32", batch_size=16)
    assert packed.bytes < 0.5 * plain.bytes
    assert_same_rows(plain, packed, 50)
    # Bits of a code are what they were; only the disk has fewer.
    assert packed.codec.bits_per_value == plain.codec.bits_per_value


def test_strings_and_other_inputs_come_back(tmp_path):
    class Named(Rows):
        def __getitem__(self, row):
            return {**super().__getitem__(row), "name": f"käse-{row}", "mask": torch.full((3,), row % 2 == 0)}

    plain, packed = both(tiny_vit(), tmp_path, Named(10), collator=lambda rows: {**collate(rows), "return_loss": True})
    assert_same_rows(plain, packed, 10)
    assert packed.read_rows([7, 2])["name"] == ["käse-7", "käse-2"]


def test_packed_store_opens_with_datasets(tmp_path):
    plain, packed = both(tiny_vit(), tmp_path)
    dataset = datasets.load_from_disk(str(packed.path))
    assert dataset.features["base"] == datasets.Value("large_binary")
    assert dataset.features["special"] == plain.dataset.features["special"]
    frame, expected = dataset[5]["base"], plain.dataset[5]["base"]
    assert list(pa.Codec("zstd").decompress(frame, len(expected), asbytes=True)) == expected
    assert packed.verify() is True


def flip_in_frame(store, row):
    """Damages the first bytes of a row's frame, in the file."""
    frame = store.dataset[row]["base"]
    [path] = store.path.glob("*.arrow")
    content = bytearray(path.read_bytes())
    place = content.find(frame)
    assert place > 0 and content.find(frame, place + 1) < 0
    content[place : place + 4] = b"\0\0\0\0"
    path.write_bytes(content)


def test_damaged_frame_is_named_and_found_by_verify(tmp_path):
    [_, built] = both(tiny_vit(), tmp_path)
    store = FeatureStore.open(shutil.copytree(built.path, tmp_path / "copy"))
    flip_in_frame(store, 13)
    damaged = FeatureStore.open(store.path)
    with pytest.raises(StoreError, match=r"row 13 of column 'base' of .*copy is damaged"):
        damaged.read([3, 13])
    assert torch.equal(damaged.read([3, 12]), built.read([3, 12]))
    with pytest.raises(StoreError, match="arrow is damaged"):
        damaged.verify()


@pytest.mark.parametrize("offset", [-5, 2**40])
def test_damaged_offsets_are_a_damaged_row(offset):
    frames = pack_rows(np.zeros((3, 50), np.uint8))
    ends = np.frombuffer(frames.buffers()[1], np.int64).copy()
    ends[2] = offset
    broken = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 3, [None, pa.py_buffer(ends), frames.buffers()[2]])
    column = PackedColumn(pa.chunked_array([broken]), 50, "column 'base'")
    assert not column.take(np.array([0])).any()
    for row in (1, 2):
        with pytest.raises(StoreError, match=f"row {row} of column 'base' is damaged"):
            column.take(np.array([row]))


def test_manifest_without_the_entry_is_one_of_a_plain_store(tmp_path):
    store = build(tiny_vit(), tmp_path)
    content = {name: value for name, value in vars(store.manifest).items() if name != "lossless"}
    assert Manifest(**content) == store.manifest
    text = (store.path / "manifest.json").read_bytes()
    assert Manifest.from_json(text, store.path) == store.manifest


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_limit_counts_rows_that_do_not_pack(codec, tmp_path):
    spec = pack(make_spec(tiny_vit(), tmp_path, codec=codec))
    store = materialize(replace(spec, directory=tmp_path / "free"), Group())
    most = estimate_bytes(spec)
    assert store.bytes <= most
    small = store.total_bytes - store.bytes
    limited = replace(spec, directory=tmp_path / "limited", limit=most + small)
    assert materialize(limited, Group()).total_bytes <= limited.limit
    with pytest.raises(OverLimit):
        materialize(replace(spec, directory=tmp_path / "less", limit=most + small - 100), Group())
    assert not (tmp_path / "less").exists()


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
def test_estimate_from_frames_is_near_the_written_bytes(codec, tmp_path):
    """The largest frames are an upper bound; means that are exact give the bytes but for padding."""
    spec = pack(make_spec(tiny_vit(), tmp_path, FlatRows(60), codec=codec, batch_size=16))
    store = materialize(spec, Group())
    split = split_batch(spec.source.probe(), "pixel_values")
    estimate = spec_bytes(spec, store.codec, split, frame_bytes=store.frame_bytes())
    assert abs(estimate - store.bytes) <= 8 * 2 * 4  # a buffer begins at a multiple of 8, in each of four batches
    assert estimate < estimate_bytes(spec)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_write_the_rows_of_one(processes, tmp_path):
    spec = pack(make_spec(tiny_vit(), tmp_path / "several"))
    alone = materialize(replace(spec, directory=tmp_path / "alone"), Group())
    for store in on_every_process(processes, lambda group: materialize(spec, group)):
        assert store.verify() and len(store.manifest.shards) == processes
        assert store.dataset[:] == alone.dataset[:]
        assert_same_rows(store, alone, 22)


def test_finished_store_is_found_again_by_its_kind_alone(tmp_path):
    plain = make_spec(tiny_vit(), tmp_path)
    assert open_matching(pack(plain), Group()) is None
    materialize(pack(plain), Group())
    assert open_matching(pack(plain), Group()).manifest.lossless
    assert open_matching(plain, Group()) is None


def test_deepening_from_a_packed_store_gives_the_bytes_of_one_from_images(tmp_path):
    model = tiny_vit().eval()
    before, after = (make_spec(model, tmp_path, cut=cut, codec="fp32") for cut in (1, 3))
    old = materialize(pack(before), Group())
    for target in (after, pack(after)):
        images = materialize(target, Group())
        assert why_not_deepen(old, target) is None
        chained = materialize(deepened(target, old, lambda batch: batch), Group())
        assert [shard.sha256 for shard in chained.manifest.shards] == [
            shard.sha256 for shard in images.manifest.shards
        ]


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_written_in_any_order_become_the_store_of_a_build(processes, tmp_path):
    spec = pack(make_spec(tiny_vit(), tmp_path / "written"))
    built = materialize(replace(spec, directory=tmp_path / "built"), Group())
    order = np.random.default_rng(0).permutation(22).tolist()

    def write(group):
        partial = PartialStore.begin(spec, group)
        for first in range(4 * group.rank, 20, 4 * group.size):
            rows = order[first : first + 4]
            batch = spec.source.collate(rows)
            features = spec.chain.prefix({"pixel_values": batch.pop("pixel_values")}, spec.cut)
            partial.write(rows, np.zeros(len(rows), np.int64), ViewRun(batch, {}, features))
        group.gather(None)
        partial.close()
        partial = PartialStore.reopen(spec, group)
        return partial.finish()

    for store in on_every_process(processes, write):
        assert store.verify() and store.manifest.lossless and store.dataset[:] == built.dataset[:]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_read_packed_rows(workers, tmp_path):
    _, store = both(tiny_vit(), tmp_path)
    switch = SourceSwitch()
    switch.set(store.path)
    loader = DataLoader(
        ReplayDataset(Rows(), switch, seed=3), batch_size=8, collate_fn=ReplayCollator(collate), num_workers=workers
    )
    for _ in range(2):
        rows = torch.cat([take_codes(batch)[0]["base"] for batch in loader])
        assert torch.equal(rows, store.read_rows(range(22))["base"])


# Training


def train(path, lossless, dataset=None, points="1:2", resume=None, model=None, **settings):
    own = {
        name: settings.pop(name)
        for name in ("save_strategy", "eval_dataset", "eval_strategy", "dataloader_num_workers", "num_train_epochs")
        if name in settings
    }
    config = manual(points, lossless=lossless, **settings)
    dataset = pixel_dataset() if dataset is None else dataset
    return run(model or tiny_vit(), dataset, path, config, resume, remove_unused_columns=False, **own)


def stores(path):
    found = [FeatureStore.open(folder) for folder in sorted((path / "_freeze_cache").iterdir())]
    return {store.manifest.cut: store for store in found}


DATA = {
    "plain": lambda: pixel_dataset(),
    "sensitive": lambda: picture_dataset().with_transform(replayable()),
    "whole": lambda: picture_dataset().with_transform(OpaqueFlip()),
}


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("plain", {}),
        ("plain", dict(dataloader_num_workers=2, codec="int8")),
        ("plain", dict(points="1:2,2:3", deepen="cache", codec="fp16")),
        ("plain", dict(materialize="write_through")),
        ("sensitive", dict(views=2)),
        ("sensitive", dict(materialize="write_through", num_train_epochs=5)),
        ("whole", dict(views=2, codec="mixed@3")),
    ],
)
def test_training_on_packed_rows_is_the_same_bit_for_bit(data, settings, tmp_path):
    plain, packed = (
        train(tmp_path / name, name == "packed", DATA[data](), **settings) for name in ("plain", "packed")
    )
    assert plain.freeze_status().replaying and packed.freeze_status().replaying
    assert losses(plain) == losses(packed)
    assert_same_weights(weights(plain), weights(packed))
    first, second = (stores(tmp_path / name) for name in ("plain", "packed"))
    assert first.keys() == second.keys() and all(store.manifest.lossless for store in second.values())
    for cut, store in first.items():
        assert store.path.name != second[cut].path.name
        assert_same_rows(store, second[cut], 32)
        kept = second[cut].frame_bytes()
        assert kept.keys() == {"base", *(f"view_{view}" for view in range(1, store.manifest.views + 1))}


@pytest.mark.parametrize("step", [4, 12])
def test_resumed_training_equals_the_uninterrupted_one(step, tmp_path):
    data = DATA["sensitive"]
    whole = train(tmp_path / "whole", True, data(), save_strategy="epoch")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", ignore=shutil.ignore_patterns("_freeze_cache"))
    checkpoint = tmp_path / "resumed" / f"checkpoint-{step}"
    resumed = train(tmp_path / "resumed", True, data(), resume=str(checkpoint), save_strategy="epoch")
    assert losses(whole) == losses(resumed)
    assert_same_weights(weights(whole), weights(resumed))


def test_setting_changes_the_fingerprint_only_when_it_is_on(tmp_path):
    made_from = [
        stores_of(train(tmp_path / str(lossless), lossless))[2].manifest.made_from for lossless in (False, True)
    ]
    assert made_from[1].pop("lossless") == "zstd"
    assert made_from[0] == made_from[1] and "lossless" not in made_from[0]


def test_evaluation_set_is_packed_too(tmp_path):
    logged = []
    for lossless in (False, True):
        settings = dict(eval_dataset=pixel_dataset(20, seed=5), eval_strategy="epoch", cache_eval=True)
        trainer = train(tmp_path / str(lossless), lossless, **settings)
        found = [FeatureStore.open(path) for path in (tmp_path / str(lossless) / "_freeze_cache").iterdir()]
        assert sorted(len(store) for store in found) == [20, 32]
        assert all(store.manifest.lossless == lossless for store in found)
        history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        logged.append(history)
    assert len(logged[0]) == 4 and logged[0] == logged[1]


def test_budget_counts_what_lies_on_the_disk_once_a_store_is_built(tmp_path):
    dataset = flat_pixels()
    free = train(tmp_path / "free", True, dataset, model=flat_vit(), points="0:2", codec="fp32")
    store = stores_of(free)[2]
    held = session_of(free).keeper.provider.holdings.state_dict()
    assert [entry["bytes"] for entry in held] == [store.total_bytes]
    needed = estimate_bytes(pack(make_spec(tiny_vit(), tmp_path, dataset, codec="fp32", batch_size=8)))
    assert 2 * store.total_bytes < needed
    # It would fit once it is packed; that is not known before, and a budget is never passed.
    budget = dict(cache_budget=str(needed), codec="fp32", points="0:2")
    declined = train(tmp_path / "budget", True, dataset, model=flat_vit(), **budget)
    assert stores_of(declined)[2].manifest.codec == "fp16"
    enough = dict(cache_budget=str(2 * needed), codec="fp32", points="0:2")
    assert stores_of(train(tmp_path / "enough", True, dataset, model=flat_vit(), **enough))[2].manifest.codec == "fp32"


def flat_pixels():
    """Pixels of one value an image, whose features repeat."""
    return pixel_dataset().map(lambda row: {"pixel_values": torch.full((3, 16, 16), float(row["labels"]))})


def stores_of(trainer):
    store = FeatureStore.open(trainer.freeze_status().store_path)
    return {store.manifest.cut: store}


# Plans and the command


@pytest.mark.parametrize(("data", "codec"), [("plain", "fp32"), ("sensitive", "int4"), ("whole", "int8")])
def test_plan_predicts_the_packed_bytes(data, codec, tmp_path):
    dataset = DATA[data]()
    args = make_args(tmp_path, remove_unused_columns=False)
    config = FreezeCacheConfig(lossless=True, codec=codec)
    found = plan(tiny_vit(), dataset, config, args=args, cuts=[2], batches=2)
    [row] = found.rows
    store = stores_of(train(tmp_path, True, dataset, codec=codec))[2]
    assert row.bytes == pytest.approx(store.bytes, rel=0.03)
    assert row.bytes < row.needed == row.most_bytes and store.bytes <= row.most_bytes
    assert "Rows are packed" in str(found)
    plain = plan(tiny_vit(), dataset, replace(config, lossless=False), args=args, cuts=[2], batches=2)
    assert plain.rows[0].most_bytes is None and plain.rows[0].needed == plain.rows[0].bytes
    assert "packed" not in str(plain)


def test_plan_says_that_rows_might_not_fit_before_they_are_packed(tmp_path):
    dataset, args = pixel_dataset(), make_args(tmp_path)
    [row] = plan(tiny_vit(), dataset, FreezeCacheConfig(lossless=True), args=args, cuts=[2], batches=1).rows
    most = replace(row, room=row.most_bytes)
    assert most.fits and not replace(row, room=row.most_bytes - 1).fits
    assert "does not fit" in replace(row, room=row.bytes).verdict


def test_inspect_says_that_rows_are_packed(tmp_path, capsys):
    plain, packed = both(tiny_vit(), tmp_path)
    for store, expected in ((plain, "int4"), (packed, "int4, every row packed with zstd")):
        assert cli.main(["inspect", str(store.path)]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("codec  ")]
        assert line.removeprefix("codec").strip() == expected
