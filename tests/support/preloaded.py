"""What `support.processes` imports before it forks: all that scripts in processes of their own need for seconds."""

import datasets  # noqa: F401
import torchvision.transforms.v2  # noqa: F401
import transformers.models.resnet.modeling_resnet
import transformers.models.vit.modeling_vit
import transformers.trainer  # noqa: F401

import hf_freezecache.trainer  # noqa: F401
