"""The picture of channels and their sensitivity."""

import sys

import pytest
import torch
from support.feature_maps import make_sensitivity, measure, partly_outside, random_maps

from hf_freezecache.cli.plots import plot_sensitivity


@pytest.mark.parametrize("channels, previews", [(1, 1), (9, 3), (9, 0)])
def test_picture_is_written(tmp_path, channels, previews):
    pytest.importorskip("matplotlib")
    base = random_maps(channels=channels)
    sources, view = partly_outside(base)
    sensitivity = measure(base, view, sources, "cosine", previews=previews)
    plot_sensitivity(sensitivity, sensitivity.choose(channels // 3), tmp_path / "picture.png", "title")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf_freezecache\[recipes\]"'):
        plot_sensitivity(make_sensitivity([0.5]), torch.tensor([0]), tmp_path / "picture.png", "title")
