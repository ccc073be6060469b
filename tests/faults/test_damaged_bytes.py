"""A byte of a store that changes is found before a wrong batch is trained, or is one that no training reads."""

import pytest

from benchmarks.faults.damages import Damage, build_store, draw_damages, suffer
from hf_freezecache.cache.names import OWNER, is_shard

SHARD = "data-00000-of-00001.arrow"


@pytest.fixture(scope="module")
def undamaged(processes, tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("undamaged"))


@pytest.mark.parametrize(
    "damage",
    [
        Damage(SHARD, 20_000, 0x01),
        Damage(SHARD, 20_000, 0x01, step=2, hides=True),
        Damage("codec.safetensors", 5, 0x80),
        Damage(OWNER, 3, 0x01),
    ],
)
def test_damage_is_found_or_read_by_nobody(damage, undamaged, tmp_path):
    story = suffer(damage, *undamaged, tmp_path / "damaged")
    assert story.survived, story
    assert story.found == damage.counts


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sixty_damages_of_all_files_train_no_wrong_batch(undamaged, tmp_path):
    store, weights = undamaged
    damages = draw_damages(store, 60, seed=1)
    stories = [suffer(damage, store, weights, tmp_path / str(number)) for number, damage in enumerate(damages)]
    assert [story for story in stories if not story.survived] == []
    assert sum(story.found for story in stories) >= 30
    assert {damage.file for damage in damages} == {path.name for path in store.iterdir()}
    assert sum(is_shard(damage.file) for damage in damages) >= 28
