"""`freezecache head save`, `load` and `push`: what they print, and how they end."""

import json

import pytest
import torch
from support.heads import load_base, logits, make_base, trained
from support.helpers import manual, pixel_dataset, run
from support.hub_server import OWNER, Fault, point_client_to, serving
from support.texts import tiny_tokenizer
from transformers import ViTForImageClassification, ViTImageProcessor

from hf_freezecache.cli.main import main

NAME = f"{OWNER}/head"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("vit", tmp_path_factory.mktemp("bases") / "vit")


@pytest.fixture
def model(base, tmp_path):
    trained(base, 2).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def call(capsys, *arguments):
    """Exit code, and what was printed; with `--json`, as values."""
    code = main(["head", *map(str, arguments)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, json.loads(printed.out) if "--json" in arguments else printed.out, printed.err


def test_model_is_saved_as_a_head_and_put_together_again(model, base, tmp_path, capsys):
    code, out, _ = call(capsys, "save", model, tmp_path / "head", "--base", base, "--cut", 2)
    assert code == 0 and out.startswith(f"{tmp_path / 'head'}: head behind 2 of 4 blocks, ")
    code, out, _ = call(capsys, "load", tmp_path / "head", tmp_path / "whole", "--base", base)
    assert (code, out) == (0, f"{tmp_path / 'whole'}: ViTForImageClassification, head and base\n")
    again = ViTForImageClassification.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(again), logits(ViTForImageClassification.from_pretrained(model)))
    assert ViTImageProcessor.from_pretrained(tmp_path / "whole").size == {"height": 16, "width": 16}


def test_json_tells_the_same(model, base, tmp_path, capsys):
    _, done, _ = call(capsys, "save", model, tmp_path / "head", "--base", base, "--cut", 3, "--json")
    size = (tmp_path / "head/head.safetensors").stat().st_size
    assert (done["cut"], done["blocks"], done["bytes"], done["base"]) == (3, 4, size, None)
    assert done["included"] == ["vit.layers.1"] and len(done["prefix_sha256"]) == 64
    _, done, _ = call(capsys, "load", tmp_path / "head", tmp_path / "whole", "--base", base, "--json")
    assert done == {"directory": str(tmp_path / "whole"), "architecture": "ViTForImageClassification"}


def test_cut_is_that_of_the_checkpoint(base, tmp_path, capsys):
    run(load_base(base), pixel_dataset(16), tmp_path / "run", manual("0:2"), num_train_epochs=1, save_strategy="epoch")
    capsys.readouterr()
    code, done, _ = call(
        capsys, "save", tmp_path / "run/checkpoint-2", tmp_path / "head", "--base", base, "--json", "--no-prefix"
    )
    assert (code, done["cut"], done["included"]) == (0, 2, [])


def test_texts_are_saved_with_their_tokenizer(tmp_path, capsys):
    base = make_base("bert", tmp_path / "base")
    trained(base, 2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert call(capsys, "save", tmp_path / "model", tmp_path / "head", "--base", base, "--cut", 2)[0] == 0
    assert (tmp_path / "head/tokenizer.json").is_file()


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["save", "{nowhere}", "{head}", "--base", "{base}", "--cut", "2"], "there is no folder"),
        (["save", "{model}", "{head}", "--base", "{base}"], "does not tell its cut: say how many blocks"),
        (["save", "{model}", "{head}", "--base", "{base}", "--cut", "9"], "a cut is from 1 to that"),
        (["save", "{model}", "{head}", "--base", "{base}", "--cut", "3", "--no-prefix"], "vit.layers.1 differ from"),
        (["load", "{nowhere}", "{head}"], "it is no folder, and no id on the Hub"),
        (["load", "{model}", "{head}"], "there is no head in"),
        (["push", "{model}", "ann/head"], "there is no head in"),
    ],
)
def test_mistake_is_told_in_a_line_and_ends_with_1(arguments, why, model, base, tmp_path, capsys):
    places = {"nowhere": tmp_path / "a/b/nowhere", "head": tmp_path / "head", "model": model, "base": base}
    code, out, err = call(capsys, *(argument.format(**places) for argument in arguments))
    assert code == 1 and out == "" and why in err
    assert [line for line in err.splitlines() if line.startswith("freezecache: ")]
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize("arguments", [["head"], ["head", "save", "model"], ["head", "burn"]])
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_head_is_pushed_and_loaded_from_the_hub(model, base, tmp_path, capsys, monkeypatch):
    from support.hub_server import WRITER

    monkeypatch.setenv("HF_TOKEN", WRITER)
    call(capsys, "save", model, tmp_path / "head", "--base", base, "--cut", 2)
    with serving() as hub:
        point_client_to(hub.url, tmp_path / "cache", monkeypatch.setattr)
        code, out, _ = call(capsys, "push", tmp_path / "head", NAME, "--private", "--message", "Mine")
        assert (code, out) == (0, f"pushed: {hub.url}/{NAME}/commit/{hub.repos[NAME].sha('main')}\n")
        assert hub.repos[NAME].private and hub.repos[NAME].commits[0][1] == "Mine"
        code, _, _ = call(capsys, "load", NAME, tmp_path / "whole", "--base", base, "--revision", "main")
        assert code == 0 and (tmp_path / "whole/preprocessor_config.json").is_file()
        _, done, _ = call(capsys, "push", tmp_path / "head", NAME, "--create-pr", "--json")
        assert done["commit"] and set(done) == {"url", "commit", "pull_request"}
        hub.faults = [Fault("/api/repos/create", 403)]
        code, _, err = call(capsys, "push", tmp_path / "head", "google/head")
        assert code == 1 and "(403)" in err and f"It is kept in {tmp_path / 'head'}" in err
        assert WRITER not in err
