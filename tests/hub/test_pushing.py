"""Heads on the Hub: pushed with the real client to a server of the test, and loaded on another machine."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from support.heads import load_base, logits, make_base, trained
from support.helpers import make_args, manual, messages, pixel_dataset
from support.hub_server import OWNER, READER, WRITER, Fault, settings_for
from support.processes import ROOT
from transformers import ViTForImageClassification, ViTImageProcessor

from hf_freezecache import FreezeCacheTrainer, HeadError, PushError, load_head, push_head_to_hub, save_head

NAME = f"{OWNER}/head"
BASE = f"{OWNER}/base"
FILES = ["README.md", "head.safetensors", "head_config.json"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("vit", tmp_path_factory.mktemp("bases") / "vit")


@pytest.fixture
def model(base):
    return trained(base, 2)


def run_elsewhere(code, hub, home, token=WRITER):
    """Runs code as another machine would: a new interpreter with empty caches and the server as its Hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {**settings_for(hub, home, token), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_pushed_head_is_loaded_on_another_machine(base, hub, tmp_path):
    load_base(base).push_to_hub(BASE)
    mine = ViTForImageClassification.from_pretrained(BASE)
    assert mine.config._name_or_path == BASE
    model = trained(base, 2)
    model.config._name_or_path = BASE
    commit = push_head_to_hub(model, NAME, cut=2, processor=ViTImageProcessor(size={"height": 16, "width": 16}))
    assert hub.paths(NAME) == sorted([*FILES, "preprocessor_config.json"])
    assert commit.oid == hub.repos[NAME].sha("main")
    config = json.loads(hub.repos[NAME].branches["main"]["head_config.json"])
    assert (config["base"], config["base_revision"]) == (BASE, hub.repos[BASE].sha("main"))
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
import torch
from support.heads import logits
from hf_freezecache import load_head
from transformers import AutoImageProcessor
loaded = load_head({NAME!r})
assert torch.equal(logits(loaded), torch.load({str(tmp_path / "logits.pt")!r}))
assert AutoImageProcessor.from_pretrained({NAME!r}).size["height"] == 16
print(type(loaded).__name__)
"""
    assert "ViTForImageClassification\n" in run_elsewhere(code, hub, tmp_path / "other-home", token=None)


def test_base_that_changed_underneath_is_taken_at_its_commit(base, model, hub, tmp_path):
    load_base(base).push_to_hub(BASE)
    model.config._name_or_path = BASE
    push_head_to_hub(model, NAME, cut=2)
    pinned = hub.repos[BASE].sha("main")
    # A Hub keeps every commit; this one the files of every branch.
    hub.repos[BASE].branches["before"] = dict(hub.repos[BASE].branches["main"])
    trained(base, 1).push_to_hub(BASE)
    assert hub.repos[BASE].sha("main") != pinned
    assert torch.equal(logits(load_head(NAME, cache_dir=tmp_path / "elsewhere")), logits(model))
    folder = save_head(model, tmp_path / "head", cut=2, base=str(base))
    with pytest.raises(HeadError, match="is not the one that the head was trained on"):
        load_head(folder, base=BASE, cache_dir=tmp_path / "third")


def test_repository_is_private_or_not_as_asked(model, hub, tmp_path):
    push_head_to_hub(model, NAME, cut=2, private=True)
    assert hub.repos[NAME].private
    push_head_to_hub(model, f"{OWNER}/open", cut=2, private=False)
    assert not hub.repos[f"{OWNER}/open"].private
    with pytest.raises(HeadError, match="cannot be read from the Hub"):
        load_head(NAME, token=False, cache_dir=tmp_path)


def test_message_branch_and_pull_request_are_as_asked(model, base, hub, tmp_path):
    push_head_to_hub(model, NAME, cut=2, commit_message="First")
    assert hub.repos[NAME].commits[0][:2] == ("main", "First")
    hub.repos[NAME].branches["next"] = {}
    push_head_to_hub(model, NAME, cut=2, revision="next")
    assert hub.paths(NAME, "next") == FILES
    commit = push_head_to_hub(trained(base, 1), NAME, cut=1, create_pr=True)
    assert commit.pr_url == f"{hub.url}/{NAME}/discussions/1"
    assert hub.repos[NAME].commits[-1][0].startswith("refs/pr/")
    assert torch.equal(logits(load_head(NAME, base=base, revision="next")), logits(model))
    with pytest.raises(ValueError, match="leave revision out"):
        push_head_to_hub(model, NAME, cut=2, create_pr=True, revision="next")


def test_folder_is_pushed_without_what_is_beside_the_head(model, hub, tmp_path):
    folder = save_head(model, tmp_path / "head", cut=2)
    (folder / "notes.txt").write_text("mine")
    (folder / "_freeze_cache").mkdir()
    (folder / "_freeze_cache/data-00000-of-00001.arrow").write_bytes(b"x" * 100)
    push_head_to_hub(folder, NAME)
    assert hub.paths(NAME) == FILES
    assert hub.uploaded() == {*FILES}


def test_damaged_head_is_not_pushed(model, hub, tmp_path):
    folder = save_head(model, tmp_path / "head", cut=2)
    content = bytearray((folder / "head.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "head.safetensors").write_bytes(content)
    with pytest.raises(HeadError, match="it was damaged"):
        push_head_to_hub(folder, NAME)
    assert not hub.repos


# What goes wrong


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where heads are kept whose push fails."""
    import tempfile

    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "kept"))
    return tmp_path / "kept"


def kept_in(temporary):
    [folder] = temporary.glob("hf-freezecache-head-*")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    return folder


def test_nothing_is_left_where_nothing_failed(model, hub, temporary):
    push_head_to_hub(model, NAME, cut=2)
    assert not list(temporary.iterdir())
    with pytest.raises(HeadError):
        push_head_to_hub(model, NAME, cut=9)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    "pattern, status, why",
    [
        ("/api/repos/create", 401, r"does not know the token \(401\): log in with `hf auth login`"),
        ("/api/repos/create", 403, r"may not write there \(403\): take one with the right to write to ann"),
        ("/preupload/", 403, r"may not write there \(403\)"),
        ("/commit/", 403, r"may not write there \(403\)"),
        ("/commit/", 409, r"somebody else has changed the repository at the same moment \(409\): push again"),
        ("/commit/", 412, r"somebody else has changed the repository at the same moment \(412\): push again"),
        ("/preupload/", 404, r"no such repository that the token may see \(404\)"),
        ("/api/repos/create", 503, r"answers with 503, in 4 tries: try again later"),
        ("/commit/", 500, r"answers with 500, in 4 tries"),
        ("PUT /lfs/", 502, r"answers with 502"),
        ("/verify", 504, r"answers with 504"),
        ("/api/repos/create", 0, r"could not be reached \("),
        ("/commit/", 0, r"could not be reached \("),
        ("PUT /lfs/", 0, r"could not be reached \("),
    ],
)
def test_refused_push_says_why_and_loses_nothing(
    pattern, status, why, model, base, hub, temporary, no_waits, caplog, monkeypatch
):
    hub.faults = [Fault(pattern, status)]
    with pytest.raises(PushError, match=why) as failure:
        push_head_to_hub(model, NAME, cut=2)
    folder = kept_in(temporary)
    assert f"It is kept in {folder}: push it with" in str(failure.value)
    assert f"freezecache head push {folder} {NAME}" in str(failure.value)
    assert torch.equal(logits(load_head(folder, base=base)), logits(model))
    if NAME in hub.repos:
        assert not hub.repos[NAME].commits
    hub.faults = []
    push_head_to_hub(folder, NAME)
    assert hub.paths(NAME) == FILES


@pytest.mark.parametrize("pattern", ["/api/repos/create", "/preupload/", "PUT /lfs/", "/verify", "/commit/"])
@pytest.mark.parametrize("status", [503, 0])
def test_passing_errors_are_tried_again(pattern, status, model, base, hub, no_waits, caplog):
    hub.faults = [Fault(pattern, status, times=2)]
    push_head_to_hub(model, NAME, cut=2)
    assert hub.paths(NAME) == FILES and len(hub.repos[NAME].commits) == 1
    assert torch.equal(logits(load_head(NAME, base=base)), logits(model))
    said = [record.message for record in caplog.records if "tried again" in record.message]
    told = r"answered with 503 \(\w+Error\)" if status else r"could not be reached \(\w+(Error|Disconnected)\)"
    assert all(re.search(told, message) for message in said)
    assert said or pattern in ("/preupload/", "PUT /lfs/", "/verify")  # the client has tried these again itself


def test_commit_whose_answer_was_lost_is_not_made_twice(model, hub, no_waits):
    """The server has committed and answers with an error."""
    from support import hub_server

    real, lost = hub_server._Handler._commit, []

    def commit(self, *args):
        if not lost:
            lost.append(True)
            self._answer, answer = lambda *_: None, self._answer
            real(self, *args)
            self._answer = answer
            self._answer(500, {"error": "lost"})
        else:
            real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_server._Handler, "_commit", commit)
        push_head_to_hub(model, NAME, cut=2)
    assert hub.paths(NAME) == FILES and len(hub.repos[NAME].commits) == 1


def test_pull_request_is_not_tried_again(model, hub, temporary, no_waits):
    push_head_to_hub(model, NAME, cut=2)
    hub.faults = [Fault("/commit/", 500)]
    with pytest.raises(PushError):
        push_head_to_hub(model, NAME, cut=1, create_pr=True)
    assert hub.count("POST .*/commit/") == 2


def test_push_that_is_broken_off_keeps_the_head(model, hub, temporary, monkeypatch, caplog):
    from huggingface_hub import HfApi

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push_head_to_hub(model, NAME, cut=2)
    assert f"was broken off. The head is kept in {kept_in(temporary)}" in messages(caplog)


def test_branch_that_is_not_there_is_named(model, hub, temporary):
    with pytest.raises(PushError, match="no branch next: make it with HfApi"):
        push_head_to_hub(model, NAME, cut=2, revision="next")


def test_foreign_owner_is_refused(model, hub, temporary):
    with pytest.raises(PushError, match="right to write to google, or another owner"):
        push_head_to_hub(model, "google/head", cut=2)


@pytest.mark.parametrize("name", ["a/b/c", "x y", "../x", "-x"])
def test_name_that_is_none_is_refused(name, model, hub, temporary):
    with pytest.raises(PushError, match="is no name of a repository"):
        push_head_to_hub(model, name, cut=2)


def test_offline_process_is_told_so(model, hub, temporary, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match=r"this process is offline \(HF_HUB_OFFLINE\): unset it"):
        push_head_to_hub(model, NAME, cut=2)


def test_repository_without_a_head_is_told_so(base, hub):
    load_base(base).push_to_hub(BASE)
    with pytest.raises(HeadError, match="holds no head .*from_pretrained of its class"):
        load_head(BASE)
    with pytest.raises(HeadError, match="cannot be read from the Hub"):
        load_head(f"{OWNER}/nothing")


# The token


@pytest.mark.parametrize("status", [401, 403, 409, 500])
@pytest.mark.parametrize("given", ["hf_secretOfThisTest0123456789", None])
def test_token_is_in_no_message_log_or_file(given, status, model, hub, temporary, no_waits, caplog):
    """Not even where a server repeats it."""
    secret = given or WRITER
    hub.faults = [Fault("/api/repos/create|/commit/", status, text=f"the token {secret} is wrong")]
    with caplog.at_level(logging.DEBUG), pytest.raises(PushError) as failure:
        push_head_to_hub(model, NAME, cut=2, token=given)
    told, error = "", failure.value
    while error is not None:
        told += f"{error!s} {error!r} "
        error = error.__cause__ if error.__suppress_context__ else error.__cause__ or error.__context__
    own = [record.getMessage() for record in caplog.records if record.name.startswith("hf_freezecache")]
    assert secret not in told + " ".join(own)
    for path in kept_in(temporary).iterdir():
        assert secret.encode() not in path.read_bytes()


def test_token_that_is_given_is_used(model, hub, temporary):
    with pytest.raises(PushError, match="403"):
        push_head_to_hub(model, NAME, cut=2, token=READER)
    push_head_to_hub(model, NAME, cut=2, token=WRITER)
    assert hub.paths(NAME) == FILES


def test_head_of_a_trainer_is_pushed(base, hub, tmp_path):
    trainer = FreezeCacheTrainer(
        model=load_base(base),
        args=make_args(tmp_path / "run", num_train_epochs=1),
        train_dataset=pixel_dataset(16),
        freeze_cache=manual("0:2"),
    )
    trainer.train()
    push_head_to_hub(trainer, NAME)
    assert hub.paths(NAME) == FILES
    assert torch.equal(logits(load_head(NAME, base=base)), logits(trainer.model))
