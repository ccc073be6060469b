"""Trainings that split a model over processes are refused in words; under the defaults they run as plain training."""

import re

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from support.helpers import losses, make_args, manual, pixel_dataset, tiny_vit
from support.pretrained import settle
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel, Trainer

from hf_freezecache import FreezeCacheTrainer

NEEDS_SHARDED_LOADING = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"),
    reason="Transformers before 5.23 says nowhere that it has sharded a model",
)


class Pretends(FreezeCacheTrainer):
    """Claims to be sharded while the training looks at it; what really trains is an ordinary process."""

    holder, attribute, value = None, None, True

    def build_context(self, *args):
        holder = self if self.holder is None else self.holder(self)
        before = getattr(holder, self.attribute)
        setattr(holder, self.attribute, self.value)
        try:
            return super().build_context(*args)
        finally:
            setattr(holder, self.attribute, before)


def claims(attribute, holder=None, value=True):
    holder = None if holder is None else staticmethod(holder)
    return type("Claims", (Pretends,), {"attribute": attribute, "holder": holder, "value": value})


def its_model(trainer):
    return trainer.model


def its_state(trainer):
    return trainer.accelerator.state


def train(trainer_class, folder, model=None, **settings):
    trainer = trainer_class(
        model=settle(tiny_vit()) if model is None else model,
        args=make_args(folder),
        train_dataset=pixel_dataset(rows=16),
        **settings,
    )
    trainer.train()
    return trainer


CASES = [
    pytest.param(claims("is_fsdp_enabled"), "FSDP1, which has no tensor for each parameter", id="fsdp1"),
    pytest.param(claims("is_deepspeed_enabled"), "DeepSpeed", id="deepspeed"),
    pytest.param(claims("_tp_size", its_model, 2), r"tensor parallelism \(tp_size=2\)", id="tp-model"),
    pytest.param(
        claims("parallelism_config", its_state, ParallelismConfig(cp_size=2)),
        r"context parallelism \(cp_size=2",
        id="context-parallel",
    ),
    pytest.param(
        claims("_is_distributed_loading_by_transformers", its_model),
        r"from_pretrained\(distributed_config=...\)",
        id="sharded-at-load-time",
        marks=NEEDS_SHARDED_LOADING,
    ),
]


@pytest.mark.parametrize(("trainer_class", "words"), CASES)
def test_sharded_training_with_explicit_settings_is_an_error_that_names_it(trainer_class, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train(trainer_class, tmp_path, freeze_cache=manual("1:2"))


@pytest.mark.parametrize(("trainer_class", "words"), CASES)
def test_sharded_training_under_the_defaults_is_plain_training_with_one_warning(
    trainer_class, words, tmp_path, caplog
):
    plain = train(Trainer, tmp_path / "plain")
    ours = train(trainer_class, tmp_path / "ours")
    warnings = [record.getMessage() for record in caplog.records if "plain training" in record.getMessage()]
    assert len(warnings) == 1 and re.search(words, warnings[0])
    assert losses(ours) == losses(plain) and ours.freeze_status().cut == 0
    assert not list((tmp_path / "ours").rglob("*.arrow"))


def test_model_with_sharded_tensors_is_refused(tmp_path):
    """What Transformers before 5.23 leaves of a model that it has sharded at load time."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = tiny_vit()
        model.classifier.weight = nn.Parameter(distribute_tensor(model.classifier.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"DTensor.*'classifier.weight'"):
            train(FreezeCacheTrainer, tmp_path, model, freeze_cache=manual("1:2"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("explicit", [True, False])
def test_several_gpus_in_one_process_freeze_and_do_not_cache(explicit, tmp_path, caplog):
    settings = {"freeze_cache": manual("1:2")} if explicit else {}
    args = make_args(tmp_path)
    args._n_gpu = 2  # where there is no GPU `DataParallel` runs the module itself
    trainer = FreezeCacheTrainer(model=settle(tiny_vit()), args=args, train_dataset=pixel_dataset(), **settings)
    trainer.train()
    status = trainer.freeze_status()
    assert isinstance(trainer.model_wrapped, nn.DataParallel) and trainer.state.global_step == 8
    assert status.cut >= 2 and not status.replaying and not list(tmp_path.rglob("*.arrow"))
    warnings = [record.getMessage() for record in caplog.records if "Several GPUs" in record.getMessage()]
    assert len(warnings) == 1 and "accelerate launch" in warnings[0]


def test_checkpoint_of_shards_without_an_index_is_refused(tmp_path):
    """Nothing says which file holds what; `Trainer` refuses it, and so does its subclass."""
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path, save_strategy="epoch"),
        train_dataset=pixel_dataset(rows=16),
        freeze_cache=manual("1:2"),
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "model.safetensors").unlink()
    tensors = list(trainer.model.state_dict().items())
    for number, part in enumerate((tensors[:20], tensors[20:]), start=1):
        torch.save(dict(part), checkpoint / f"pytorch_model-{number:05}-of-00002.bin")
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
