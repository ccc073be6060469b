"""What splits a model or a sample over processes is named; what does not is let through."""

import inspect

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from support.helpers import make_args, tiny_vit
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel, Trainer

from hf_freezecache.training.sharding import why_model_sharded, why_sharded


@pytest.fixture
def trainer(tmp_path):
    return Trainer(model=tiny_vit(), args=make_args(tmp_path))


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_training_in_one_process_is_not_sharded(trainer):
    assert why_sharded(trainer) is None


@pytest.mark.parametrize(
    "attribute, words",
    [
        ("is_fsdp_enabled", "FSDP1, which"),
        ("is_fsdp_xla_enabled", "FSDP of XLA"),
        ("is_deepspeed_enabled", "DeepSpeed"),
    ],
)
def test_wrappers_are_named(attribute, words, trainer):
    setattr(trainer, attribute, True)
    assert why_sharded(trainer).startswith(words)


def test_megatron_is_named(trainer, monkeypatch):
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.MEGATRON_LM)
    assert why_sharded(trainer) == "Megatron-LM"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"dp_shard_size": 2}, "sharded data parallelism (dp_shard_size=2 in `parallelism_config`)"),
        ({"tp_size": 2}, "tensor parallelism (tp_size=2 in `parallelism_config`)"),
        ({"cp_size": 4}, "context parallelism (cp_size=4 in `parallelism_config`)"),
        ({"sp_size": 2}, "sequence parallelism (sp_size=2 in `parallelism_config`)"),
        ({"dp_replicate_size": 2}, None),  # every process holds the whole model
    ],
)
def test_parallelism_of_accelerate_is_named(settings, words, trainer, monkeypatch):
    if "sp_size" in settings and "sp_size" not in inspect.signature(ParallelismConfig).parameters:
        pytest.skip("this accelerate has no sequence parallelism")
    monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", ParallelismConfig(**settings))
    assert why_sharded(trainer) == words


def test_tensor_parallel_model_is_named():
    model = tiny_vit()
    assert why_model_sharded(model) is None  # the attribute that Transformers sets is None here
    model._tp_size = 1
    assert why_model_sharded(model) is None
    model._tp_size = 2
    assert why_model_sharded(model) == "tensor parallelism (tp_size=2)"


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"),
    reason="Transformers before 5.23 says nowhere that it has sharded a model",
)
def test_model_sharded_at_load_time_is_named():
    model = tiny_vit()
    model._is_distributed_loading_by_transformers = True
    assert why_model_sharded(model) == "a model that `from_pretrained(distributed_config=...)` sharded"


def test_model_with_sharded_tensors_is_named(mesh):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert why_model_sharded(model) is None
    sharded = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sharded[1].weight = nn.Parameter(distribute_tensor(sharded[1].weight.detach(), mesh, [Shard(0)]))
    assert why_model_sharded(sharded) == "a model with sharded tensors (DTensor), e.g. '1.weight'"
    model[1].running_mean = distribute_tensor(model[1].running_mean, mesh, [Shard(0)])
    assert why_model_sharded(model) == "a model with sharded tensors (DTensor), e.g. '1.running_mean'"
