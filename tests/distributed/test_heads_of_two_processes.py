"""Two processes train (gloo, CPU), and one pushes the head."""

from pathlib import Path

import torch
from support.heads import load_base, logits, make_base
from support.hub_server import serving
from support.launching import launch

from hf_freezecache import load_head


def test_one_of_two_processes_pushes_the_head(tmp_path):
    base = make_base("resnet", tmp_path / "base")
    script = Path(__file__).parent / "script_push.py"
    with serving() as hub:
        launch(["--output", tmp_path, "--base", base, "--hub", hub.url], script=script)
        [(branch, message, paths)] = hub.repos["ann/head"].commits
        assert (branch, message) == ("main", "End of training")
        assert paths == ["README.md", "head.safetensors", "head_config.json"]
        assert hub.count("POST .*/commit/") == 1 and hub.count("PUT /lfs/") == 1
        (tmp_path / "head").mkdir()
        for name, content in hub.repos["ann/head"].branches["main"].items():
            (tmp_path / "head" / name).write_bytes(content)
    loaded = load_head(tmp_path / "head", base=base)
    assert torch.equal(logits(loaded), torch.load(tmp_path / "logits-0.pt"))
    assert not torch.equal(logits(loaded), logits(load_base(base)))
