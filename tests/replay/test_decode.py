"""Features from the rows of a store."""

import numpy as np
import torch
from support.images import picture_dataset, replayable
from support.view_trainings import train

from hf_freezecache.replay.decode import replay_features


def test_mixed_batch_is_what_its_rows_are_alone(tmp_path):
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=1)
    views = np.array([0, 1, 1, 0, 1])
    codes = store.read_rows([3, 4, 5, 6, 7], views)
    codes = {name: codes[name] for name in store.code_names(codes)}
    together = replay_features(store, codes)
    for row in range(5):
        alone = replay_features(store, {name: value[row : row + 1] for name, value in codes.items()})
        assert torch.equal(alone[0], together[row])
