"""What the package takes from `Trainer` and other private code is still what it was when somebody read it.

`python tests/test_trainer_contract.py --show NAME` prints a body of `Trainer` without comments: run it under two
versions of Transformers and compare. `python tests/test_trainer_contract.py --renew` records the installed version.
"""

import ast
import contextlib
import difflib
import inspect
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from support.codec_cases import NEEDS_ZFP
from support.helpers import make_args, manual, pixel_dataset, tiny_vit
from support.trainer_contract import (
    CallLog,
    NotesEvents,
    Uses,
    code_of,
    digest,
    imported,
    imports_of_package,
    load_record,
    names_on,
    note_what_it_holds,
    noting,
    renew,
    scan_class,
    signature_of,
    trainer_code,
    uses_of_package,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.distributed import rewrap_ddp

RECORD = load_record()
RENEW = "python tests/test_trainer_contract.py --renew"


def train(trainer_class, folder, log, resume=False):
    """Two epochs of one step each, evaluated and saved; resumed: the second one."""
    settings = {"freeze_cache": manual("1:2", codec="fp32")} if issubclass(trainer_class, FreezeCacheTrainer) else {}
    trainer = noting(trainer_class, log)(
        model=tiny_vit(),
        args=make_args(
            folder,
            num_train_epochs=2,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
        ),
        train_dataset=pixel_dataset(rows=8),
        eval_dataset=pixel_dataset(rows=8),
        callbacks=[NotesEvents(log)],
        **settings,
    )
    log.lines.clear()
    note_what_it_holds(trainer, log)
    trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-1") if resume else None)
    return trainer


@cache
def logs(trainer_class):
    """Calls of a fresh and of a resumed training."""
    found = {"fresh": CallLog(), "resumed": CallLog()}
    with tempfile.TemporaryDirectory() as folder:
        for name, log in found.items():
            train(trainer_class, folder, log, resume=name == "resumed")
    return found


# The table


def test_every_use_is_recorded():
    uses = uses_of_package()
    recorded = {*RECORD["code"], *RECORD["attributes"]}
    assert uses.names == recorded, f"new or gone: {uses.names ^ recorded}. Look at them, then run {RENEW}"
    assert uses.chains == set(RECORD["chains"]), f"{uses.chains ^ set(RECORD['chains'])}: then run {RENEW}"
    assert imports_of_package() == set(RECORD["imports"]), f"look at the imports, then run {RENEW}"
    overridden = {name for name, entry in RECORD["code"].items() if entry["overridden"]}
    assert uses.overrides == overridden, f"{uses.overrides ^ overridden}: look at them, then run {RENEW}"


def test_scan_finds_overrides_and_uses_of_every_form():
    source = """
    class Hooks:
        mine = 1
        def compute_loss(self, model, inputs):
            "_docs"
            def create_scheduler(): ...
            self.__dict__.pop("_eval_dataloaders", None)
            self._mine = self.args.n_gpu + self.args.mine.deeper
            return super().compute_loss(model, inputs), type(self).log is Trainer.log, self.state
        def _mine(self): ...
    """
    uses = Uses()
    scan_class(ast.parse(inspect.cleandoc(source)), names_on(Trainer), uses)
    assert uses.overrides == {"compute_loss"}
    assert uses.names == {"compute_loss", "_eval_dataloaders", "args", "log", "state"}
    assert uses.chains == {"args.n_gpu", "args.mine"}


def test_digest_follows_code_and_nothing_else(tmp_path, monkeypatch):
    texts = {
        "first": 'def step(x, y="# no comment"):\n    """Says."""\n    return x + 1\n',
        "same": 'def step(x, y="# no comment"):  # why\n    """Says\n    it."""\n\n    # because\n    return x + 1\n',
        "other": 'def step(x, y="# no comment"):\n    """Says."""\n    return x + 2\n',
    }
    digests = {}
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in texts.items():
        (tmp_path / f"contract_{name}.py").write_text(text)
        digests[name] = digest(imported(f"contract_{name}.step"))
    assert digests["first"] == digests["same"] != digests["other"]


# Signatures and bodies


@pytest.mark.parametrize("name", RECORD["code"])
def test_signature_of_trainer_is_the_recorded_one(name):
    assert signature_of(trainer_code(name)) in RECORD["code"][name]["signatures"], (
        f"`Trainer.{name}` takes other arguments: let the package follow, add the signature to the entry in "
        f"trainer_contract.json, then run {RENEW}"
    )


@pytest.mark.parametrize("name", RECORD["imports"])
def test_signature_of_import_is_the_recorded_one(name):
    assert signature_of(imported(name)) in RECORD["imports"][name]["signatures"]


@pytest.mark.parametrize("name", RECORD["code"])
def test_body_of_trainer_was_read(name):
    check_body(f"Trainer.{name}", trainer_code(name), RECORD["code"][name])


@pytest.mark.parametrize("name", RECORD["imports"])
def test_body_of_import_was_read(name):
    check_body(name, imported(name), RECORD["imports"][name])


def check_body(name, thing, entry):
    version, bodies = transformers.__version__, entry["bodies"]
    seen = " ".join(bodies.values())
    assert digest(thing) in bodies, (
        f"Transformers {version} has a body of `{name}` that nobody has compared with the package (read in {seen}). "
        f"Read this diff: `python tests/test_trainer_contract.py --show {name}` under both versions. If the package "
        f"still does the right thing, run {RENEW}"
    )


@pytest.mark.parametrize("name", [name for name, entry in RECORD["code"].items() if entry["overridden"]])
def test_override_takes_what_trainer_gives(name):
    theirs, ours = inspect.signature(trainer_code(name)), inspect.signature(getattr(FreezeCacheTrainer, name))
    plain = [p for p in theirs.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert plain[0].name == "self"
    ours.bind(*plain)
    ours.bind(plain[0], **{parameter.name: parameter for parameter in plain[1:]})
    needed = [parameter for parameter in plain if parameter.default is parameter.empty]
    ours.bind(*needed)


# Attributes


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A plain trainer that has made a step, its loaders, kept for their workers, and a repository on a Hub."""
    args = make_args(
        tmp_path_factory.mktemp("run"), max_steps=1, dataloader_num_workers=1, dataloader_persistent_workers=True
    )
    trainer = Trainer(model=tiny_vit(), args=args, train_dataset=pixel_dataset(), eval_dataset=pixel_dataset())
    trainer.train()
    trainer.get_eval_dataloader()
    with pytest.MonkeyPatch.context() as patch:
        repo = SimpleNamespace(repo_id="ann/run")
        patch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(create_repo=lambda *_, **__: repo))
        trainer.init_hf_repo()
    return trainer


@pytest.mark.parametrize("name", [*RECORD["attributes"], *RECORD["chains"]])
def test_attribute_exists(name, started):
    thing = started
    for part in name.split("."):
        assert hasattr(thing, part), f"a `Trainer` of Transformers {transformers.__version__} has no `{name}`"
        thing = getattr(thing, part)


def test_eval_loaders_are_kept_in_a_dict_of_the_instance(started):
    assert isinstance(vars(started)["_eval_dataloaders"], dict)


# Order


@pytest.mark.parametrize("kind", ["fresh", "resumed"])
def test_trainer_calls_its_hooks_in_the_recorded_order(kind):
    assert_same_lines(logs(Trainer)[kind].lines, RECORD["order"][kind])


@pytest.mark.parametrize("kind", ["fresh", "resumed"])
def test_freezing_and_caching_change_no_order(kind):
    assert_same_lines(logs(FreezeCacheTrainer)[kind].hooks_only(), logs(Trainer)[kind].hooks_only())


def assert_same_lines(found, expected):
    diff = "\n".join(difflib.unified_diff(expected, found, "recorded", "found", lineterm=""))
    assert found == expected, f"the hooks of `Trainer` are called in another order:\n{diff}"


# Private things of other packages


def test_ddp_takes_what_rewrapping_gives_and_holds_what_it_reads():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
            bucket_cap_mb=3,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
        wrapper.set_by_accelerate, reducer = "stays", wrapper.reducer
        read = {"bucket_bytes_cap": 3 * 2**20, "find_unused_parameters": True, "gradient_as_bucket_view": True}
        assert {name: getattr(wrapper, name) for name in read} == read
        wrapper.module[0].requires_grad_(False)
        rewrap_ddp(wrapper)
        assert wrapper.reducer is not reducer and wrapper.set_by_accelerate == "stays"
        assert {name: getattr(wrapper, name) for name in read} == read
        wrapper(torch.ones(1, 3)).sum().backward()
        assert wrapper.module[1].weight.grad is not None and wrapper.module[0].weight.grad is None
    finally:
        torch.distributed.destroy_process_group()


def test_flop_formulas_with_get_raw_are_given_tensors():
    def count(first, second, *args, out_val=None, **kwargs):
        seen.extend([first, second])
        return 7

    seen = []
    count._get_raw = True
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mul: count}) as counter:
        torch.ones(2, 3) * torch.ones(2, 3)
    assert counter.get_total_flops() == 7
    assert all(isinstance(one, torch.Tensor) for one in seen)


def test_fingerprints_of_datasets_follow_content_and_transform():
    first, again, other = (datasets.Dataset.from_dict({"x": values}) for values in ([1, 2], [1, 2], [1, 3]))
    assert isinstance(first._fingerprint, str)
    assert first._fingerprint == again._fingerprint != other._fingerprint
    changed = [
        first.select([1, 0]),
        first.with_format("torch"),
        first.with_transform(round),
        first.with_transform(abs),
    ]
    assert len({first._fingerprint, *(dataset._fingerprint for dataset in changed)}) == 5
    assert first.with_transform(abs)._fingerprint == again.with_transform(abs)._fingerprint


@NEEDS_ZFP
def test_zfpy_decompresses_into_a_given_array():
    import numpy as np
    import zfpy

    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    row = zfpy.compress_numpy(values, rate=16, write_header=False)
    out = np.empty_like(values)
    zfpy._decompress(row, zfpy.dtype_to_ztype(np.dtype(np.float32)), values.shape, out=out, rate=16)
    assert np.abs(out - values).max() < 1e-2


def test_checkpointed_layers_keep_their_function_with_its_settings():
    model = tiny_vit()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    functions = [
        module._gradient_checkpointing_func
        for module in model.modules()
        if hasattr(module, "_gradient_checkpointing_func")
    ]
    assert functions and all(function.keywords["use_reentrant"] is False for function in functions)


def test_models_name_what_they_do_not_save():
    assert hasattr(tiny_vit(), "_keys_to_ignore_on_save")


def show(name):
    """Prints a function without docstring and comments."""
    name = name.removeprefix("Trainer.")
    sys.stdout.write(code_of(imported(name) if "." in name else trainer_code(name)) + "\n")


def main(arguments):
    if len(arguments) == 2 and arguments[0] == "--show":
        show(arguments[1])
    elif arguments == ["--renew"]:
        transformers.logging.set_verbosity_error()
        with contextlib.redirect_stdout(None):
            orders = {name: log.lines for name, log in logs(Trainer).items()}
        refused = renew(orders)
        if refused:
            advice = (
                "Left as recorded. Let the package follow, add what is right to trainer_contract.json, then renew:"
            )
            sys.exit("\n".join([advice, *refused]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
