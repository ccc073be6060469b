"""Tiny instances of every supported model family, with dropout and drop-path where the family has them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from torch import nn

CLASSES = 5

_TRANSFORMER = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=16,
    patch_size=4,
    hidden_dropout_prob=0.1,
    num_labels=CLASSES,
)
_DINO = {**_TRANSFORMER, "mlp_ratio": 2, "drop_path_rate": 0.2}
_DINO.pop("intermediate_size")


def vit(**settings) -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**{**_TRANSFORMER, **settings}))


def deit(**settings) -> nn.Module:
    return tf.DeiTForImageClassification(tf.DeiTConfig(**{**_TRANSFORMER, **settings}))


def dinov2(**settings) -> nn.Module:
    return tf.Dinov2ForImageClassification(tf.Dinov2Config(**{**_DINO, **settings}))


def dinov2_registers(**settings) -> nn.Module:
    config = tf.Dinov2WithRegistersConfig(**{**_DINO, "num_register_tokens": 3, **settings})
    return tf.Dinov2WithRegistersForImageClassification(config)


def beit(**settings) -> nn.Module:
    return tf.BeitForImageClassification(tf.BeitConfig(**{**_TRANSFORMER, "drop_path_rate": 0.2, **settings}))


def beit_relative() -> nn.Module:
    return _shake(beit(use_relative_position_bias=True))


def beit_shared() -> nn.Module:
    return _shake(beit(use_shared_relative_position_bias=True))


def convnext() -> nn.Module:
    config = tf.ConvNextConfig(
        num_stages=3,
        hidden_sizes=[8, 12, 16],
        depths=[1, 2, 1],
        image_size=32,
        patch_size=4,
        drop_path_rate=0.2,
        num_labels=CLASSES,
    )
    return tf.ConvNextForImageClassification(config)


def swin() -> nn.Module:
    config = tf.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        drop_path_rate=0.2,
        hidden_dropout_prob=0.1,
        num_labels=CLASSES,
    )
    return tf.SwinForImageClassification(config)


def resnet(layer_type: str = "basic") -> nn.Module:
    config = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type=layer_type, num_labels=CLASSES
    )
    return tf.ResNetForImageClassification(config)


def resnet_bottleneck() -> nn.Module:
    return resnet("bottleneck")


def mobilenet() -> nn.Module:
    config = tf.MobileNetV2Config(depth_multiplier=0.15, image_size=32, num_labels=CLASSES)
    return tf.MobileNetV2ForImageClassification(config)


#: Every Transformers family that the chain declares.
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "deit": deit,
    "dinov2": dinov2,
    "dinov2_registers": dinov2_registers,
    "beit": beit,
    "beit_relative": beit_relative,
    "beit_shared": beit_shared,
    "convnext": convnext,
    "swin": swin,
    "resnet": resnet,
    "resnet_bottleneck": resnet_bottleneck,
    "mobilenet": mobilenet,
}
#: Blocks expected in each: stem included.
BLOCKS = {
    **dict.fromkeys(["vit", "deit", "dinov2", "dinov2_registers", "beit", "beit_relative", "beit_shared"], 4),
    **dict.fromkeys(["convnext", "swin", "resnet", "resnet_bottleneck"], 5),
    "mobilenet": 17,
}


def make(name: str, seed: int = 0) -> nn.Module:
    """A family's tiny model with the weights of a seed, in eval mode."""
    torch.manual_seed(seed)
    return FAMILIES[name]().eval()


def pixels(model: nn.Module, rows: int = 3, seed: int = 1) -> torch.Tensor:
    """Random images of the model's size: `(rows, 3, H, W)`."""
    size = getattr(model.config, "image_size", None) or 32
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, size, size, generator=generator)


def timm_vit(**settings) -> nn.Module:
    """timm's ViT: its CLS token and position embedding are parameters of the model itself."""
    import timm

    sizes = dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=CLASSES)
    return timm.models.vision_transformer.VisionTransformer(**{**sizes, **settings}).eval()


TIMM_BLOCKS = ["patch_embed", "blocks.0", "blocks.1", "blocks.2"]


class ConvNet(nn.Module):
    """A plain module: stem, two stages with BatchNorm and dropout, head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


CONVNET_BLOCKS = ["stem", "first", "second"]


class SkipNet(ConvNet):
    """The stem's output also jumps over `first` and `second`."""

    def forward(self, x):
        stem = self.stem(x)
        return self.head((self.second(self.first(stem)) + stem).mean((2, 3)))


def _shake(model: nn.Module) -> nn.Module:
    """Fills the relative position tables, which start as zeros and would hide a mistake."""
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(parameter)
    return model
