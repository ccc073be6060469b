"""Tiny classifiers of timm's families, in the wrapper that `Trainer` needs."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import timm
from timm.layers import GatedMlp
from timm.models.maxxvit import MaxxVitCfg
from timm.models.metaformer import (
    Attention,
    GroupNorm1,
    GroupNorm1NoBias,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    SepConv,
)
from timm.models.mlp_mixer import Affine, ResBlock, SpatialGatingBlock
from timm.models.mvitv2 import MultiScaleVitCfg
from timm.models.nfnet import NfCfg
from torch import nn

from hf_freezecache import wrap_classifier

from .entry import Entry, build
from .inputs import Batch, labelled_pixels
from .transformers_configs import CLASSES


@dataclass(frozen=True)
class _Model:
    """A model of a family: a name for `timm.create_model`, or `module.Class` below `timm.models`, with settings.

    The class is called itself where the named models fix the sizes that the settings change.
    """

    source: str
    size: int
    settings: dict[str, Any]


def _model(source: str, size: int = 64, **settings: Any) -> _Model:
    return _Model(source, size, settings)


def _vit(source: str, size: int = 64, **settings: Any) -> _Model:
    return _model(source, size, img_size=size, depth=4, embed_dim=48, num_heads=3, **settings)


def _resnet(source: str, **settings: Any) -> _Model:
    return _model(source, layers=(1, 1, 2, 1), channels=(16, 16, 32, 32), **settings)


_DEPTHS = (1, 1, 2, 1)
_WIDTHS = (16, 32, 48, 64)
_HEADS = (1, 2, 3, 4)

_TRANSFORMERS = {
    "aimv2": _vit("aimv2_large_patch14_224", 56),
    "beit": _vit("beit_base_patch16_224"),
    "cait": _model("cait_xxs24_224", img_size=64, depth=4, embed_dim=48, num_heads=4),
    "coat": _model(
        "coat.CoaT", img_size=64, patch_size=4, embed_dims=(16, 32, 32, 32), serial_depths=_DEPTHS, parallel_depth=1
    ),
    "coat_lite": _model("coat.CoaT", img_size=64, patch_size=4, embed_dims=(16, 32, 48, 64), serial_depths=_DEPTHS),
    "convit": _model("convit_tiny", img_size=64, depth=4, embed_dim=48, num_heads=4, local_up_to_layer=2),
    "crossvit": _model(
        "crossvit.CrossVit",
        48,
        img_size=48,
        patch_size=(12, 16),
        embed_dim=(24, 32),
        depth=((1, 2, 0), (1, 2, 0)),
        num_heads=(2, 2),
        mlp_ratio=(2.0, 2.0, 1.0),
    ),
    "davit": _model("davit_tiny", depths=_DEPTHS, embed_dims=_WIDTHS, num_heads=_HEADS),
    "deit3": _vit("deit3_small_patch16_224"),
    "deit_distilled": _vit("deit_tiny_distilled_patch16_224"),
    "dinov2_registers": _vit("vit_small_patch14_reg4_dinov2", 56),
    "dinov3": _vit("vit_small_patch16_dinov3"),
    "eva02": _vit("eva02_tiny_patch14_224", 56),
    "gcvit": _model(
        "gcvit.GlobalContextVit",
        img_size=64,
        embed_dim=16,
        depths=_DEPTHS,
        num_heads=(1, 2, 2, 4),
        window_size=(4, 4, 4, 2),
        layer_scale=1e-5,
    ),
    "hiera": _model("hiera_tiny_224", img_size=(64, 64), embed_dim=24, stages=_DEPTHS),
    "hieradet": _model(
        "hieradet_sam2.HieraDet", embed_dim=16, stages=_DEPTHS, window_spec=(4, 4, 4, 2), global_att_blocks=(3,)
    ),
    "levit": _model(
        "levit.Levit", img_size=64, embed_dim=(16, 24, 32), key_dim=8, depth=(2, 2, 2), num_heads=(2, 3, 4)
    ),
    "levit_distilled": _model(
        "levit.LevitDistilled", img_size=64, embed_dim=(16, 24, 32), key_dim=8, depth=(2, 2, 2), num_heads=(2, 3, 4)
    ),
    "mvitv2": _model(
        "mvitv2.MultiScaleVit", img_size=(64, 64), cfg=MultiScaleVitCfg(depths=_DEPTHS, embed_dim=16, num_heads=1)
    ),
    "naflexvit": _model("naflexvit_base_patch16_gap", depth=4, embed_dim=48, num_heads=3),
    "nest": _model("nest.Nest", img_size=64, embed_dims=(24, 48, 96), depths=(1, 1, 2), num_heads=(1, 2, 4)),
    "nextvit": _model("nextvit.NextViT", in_chans=3, stem_chs=(16, 16, 16), depths=(1, 1, 5, 1)),
    "pit": _model("pit.PoolingVisionTransformer", img_size=64, base_dims=(8, 8, 8), depth=(1, 2, 2), heads=(2, 4, 8)),
    "pit_distilled": _model(
        "pit.PoolingVisionTransformer",
        img_size=64,
        base_dims=(8, 8, 8),
        depth=(1, 2, 2),
        heads=(2, 4, 8),
        distilled=True,
    ),
    "pvt_v2": _model(
        "pvt_v2.PyramidVisionTransformerV2", depths=_DEPTHS, embed_dims=_WIDTHS, num_heads=_HEADS, mlp_ratios=(2,) * 4
    ),
    "samvit": _vit("samvit_base_patch16_224"),
    "sequencer": _model(
        "sequencer2d_s",
        layers=_DEPTHS,
        embed_dims=(24, 48, 48, 48),
        hidden_sizes=(8, 12, 12, 12),
    ),
    "swin": _model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        embed_dim=12,
        depths=(1, 1, 3, 1),
        num_heads=(1, 2, 3, 6),
        window_size=4,
    ),
    "swinv2": _model(
        "swinv2_tiny_window8_256",
        img_size=64,
        embed_dim=12,
        depths=(1, 1, 3, 1),
        num_heads=(1, 2, 3, 6),
        window_size=4,
    ),
    "swinv2_cr": _model(
        "swinv2_cr_tiny_ns_224", img_size=64, embed_dim=12, depths=(1, 1, 3, 1), num_heads=(1, 2, 3, 6), window_size=2
    ),
    "tinyvit": _model(
        "tiny_vit.TinyVit", embed_dims=_WIDTHS, depths=_DEPTHS, num_heads=_HEADS, window_sizes=(4, 4, 4, 2)
    ),
    "tnt": _model(
        "tnt_s_legacy_patch16_224",
        img_size=64,
        embed_dim=48,
        inner_dim=8,
        depth=3,
        num_heads_inner=2,
        num_heads_outer=4,
    ),
    "twins_pcpvt": _model("twins_pcpvt_small", img_size=64, embed_dims=_WIDTHS, num_heads=_HEADS, depths=_DEPTHS),
    "twins_svt": _model("twins_svt_small", img_size=64, embed_dims=_WIDTHS, num_heads=_HEADS, depths=_DEPTHS),
    "visformer": _model(
        "visformer.Visformer", img_size=64, init_channels=8, embed_dim=32, depth=(1, 2, 2), num_heads=2, group=4
    ),
    "vit": _vit("vit_tiny_patch16_224"),
    "vit_gap_registers": _vit("vit_little_patch16_reg4_gap_256"),
    "vit_hybrid": _vit("vit_tiny_r_s16_p8_224"),
    "vit_map_pool": _vit("vit_so150m_patch16_reg4_map_256"),
    "vit_parallel": _vit("vit_small_patch16_18x2_224"),
    "vit_relative": _vit("vit_relpos_small_patch16_224"),
    "volo": _model(
        "volo.VOLO",
        img_size=64,
        layers=_DEPTHS,
        embed_dims=(24, 48, 48, 48),
        num_heads=(2, 4, 4, 4),
        stem_hidden_dim=8,
        post_layers=("ca",),
    ),
    "xcit": _model("xcit_nano_12_p16_224", img_size=64, depth=3, embed_dim=48, num_heads=4),
}
_CONVOLUTIONS = {
    "byobnet": _model("test_byobnet"),
    "convmixer": _model("convmixer.ConvMixer", dim=32, depth=4),
    "convnext": _model("convnext_atto", depths=(1, 1, 3, 1), dims=(8, 16, 24, 32)),
    "convnextv2": _model("convnextv2_atto", depths=(1, 1, 3, 1), dims=(8, 16, 24, 32)),
    "cspresnet": _model("cspresnet50"),
    "densenet": _model("densenet121", growth_rate=8, block_config=(2, 2, 3, 2)),
    "dla": _model("dla.DLA", levels=(1, 1, 1, 2, 2, 1), channels=(8, 8, 16, 16, 24, 32), base_width=32),
    "dpn": _model("dpn.DPN", k_sec=_DEPTHS, inc_sec=(8, 8, 8, 8), k_r=16, groups=4, num_init_features=16),
    "ecaresnet": _resnet("ecaresnet26t"),
    "efficientnet": _model("test_efficientnet"),
    "efficientnet_evonorm": _model("test_efficientnet_evos"),
    "fasternet": _model("fasternet.FasterNet", embed_dim=16, depths=_DEPTHS, feature_dim=64),
    "ghostnet": _model("ghostnet_050"),
    "hardcorenas": _model("hardcorenas_a"),
    "hgnet": _model("hgnetv2_b0"),
    "hrnet": _model("hrnet_w18_small"),
    "inception_next": _model("inception_next.MetaNeXt", depths=_DEPTHS, dims=(16, 24, 32, 48)),
    "inception_v4": _model("inception_v4", 96),
    "lcnet": _model("lcnet_035"),
    "mambaout": _model("test_mambaout"),
    "mixnet": _model("mixnet_s"),
    "mnasnet": _model("mnasnet_small"),
    "mobilenetv1": _model("mobilenetv1_100"),
    "mobilenetv2": _model("mobilenetv2_050"),
    "mobilenetv3": _model("mobilenetv3_small_050"),
    "mobilenetv4": _model("mobilenetv4_conv_small_035"),
    "mobileone": _model("mobileone_s0"),
    "nfnet": _model("test_nfnet"),
    "nfnet_gated": _model(
        "nfnet.NormFreeNet",
        cfg=NfCfg(
            depths=(1, 1, 2, 1),
            channels=(16, 32, 32, 48),
            skipinit=True,
            attn_layer="eca",
            attn_kwargs={},
            stem_chs=16,
        ),
    ),
    "regnetx": _model("regnetx_002"),
    "regnety": _model("regnety_002"),
    "regnetz": _model("regnetz_005"),
    "repghost": _model("repghostnet_050"),
    "repvgg": _model("repvgg_a0"),
    "res2net": _resnet("res2net50_26w_4s"),
    "resnest": _resnet("resnest14d"),
    "resnet": _resnet("resnet18"),
    "resnet_d": _resnet("resnet26d"),
    "resnetv2": _model("resnetv2_50", layers=_DEPTHS, channels=(32, 48, 64, 96)),
    "resnext": _resnet("resnext50_32x4d"),
    "rexnet": _model("rexnet_100", width_mult=0.5),
    "selecsls": _model("selecsls42b"),
    "senet": _model("legacy_seresnet18"),
    "seresnet": _resnet("seresnet50"),
    "skresnet": _resnet("skresnet18"),
    "starnet": _model("starnet_s050"),
    "tf_efficientnetv2": _model("tf_efficientnetv2_b0", channel_multiplier=0.25),
    "tinynet": _model("tinynet_e"),
    "tresnet": _model("tresnet.TResNet", layers=[1, 1, 2, 1], width_factor=0.25),
    "vovnet": _model("ese_vovnet19b_slim_dw"),
    "xception": _model("xception41"),
}
_MIXTURES = {
    "caformer": _model(
        "metaformer.MetaFormer",
        depths=_DEPTHS,
        dims=(32, 32, 64, 64),
        token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
    ),
    "coatnet": _model("test_coatnet", img_size=64),
    "edgenext": _model("edgenext.EdgeNeXt", dims=_WIDTHS, depths=(1, 2, 2, 1), heads=(2, 2, 2, 2)),
    "efficientformer": _model(
        "efficientformer.EfficientFormer", 224, depths=(1, 1, 1, 2), embed_dims=(16, 24, 32, 48), num_vit=1
    ),
    "efficientformerv2": _model("efficientformerv2_s0", img_size=64),
    "efficientvit_mit": _model("efficientvit_b0"),
    "efficientvit_msra": _model("efficientvit_m0", 128, img_size=128),
    "fastvit": _model("fastvit_t8"),
    "focalnet": _model("focalnet.FocalNet", embed_dim=16, depths=_DEPTHS, layerscale_value=1e-4),
    "gmlp": _model(
        "mlp_mixer.MlpMixer",
        img_size=64,
        num_blocks=4,
        embed_dim=32,
        mlp_ratio=6,
        block_layer=SpatialGatingBlock,
        mlp_layer=GatedMlp,
    ),
    "lambda": _model("lambda_resnet26rpt_256", img_size=64),
    "maxvit": _model("test_maxvit", img_size=64),
    "maxxvit": _model(
        "maxxvit.MaxxVit",
        img_size=64,
        cfg=MaxxVitCfg(embed_dim=(32, 32, 64, 64), depths=_DEPTHS, stem_width=16, block_type=("C", "C", "T", "T")),
    ),
    "mixer": _model("mlp_mixer.MlpMixer", img_size=64, num_blocks=4, embed_dim=48),
    "mobilevit": _model("mobilevit_xxs"),
    "mobilevitv2": _model("mobilevitv2_050"),
    "poolformer": _model(
        "metaformer.MetaFormer",
        depths=_DEPTHS,
        dims=_WIDTHS,
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
    ),
    "poolformerv2": _model(
        "metaformer.MetaFormer", depths=_DEPTHS, dims=_WIDTHS, norm_layers=GroupNorm1NoBias, use_mlp_head=False
    ),
    "repvit": _model("repvit.RepVit", img_size=64, embed_dim=_WIDTHS, depth=_DEPTHS),
    "resmlp": _model(
        "mlp_mixer.MlpMixer",
        img_size=64,
        num_blocks=4,
        embed_dim=48,
        mlp_ratio=4,
        block_layer=ResBlock,
        norm_layer=Affine,
    ),
    "rdnet": _model(
        "rdnet.RDNet",
        num_init_features=16,
        growth_rates=(16, 16, 24),
        num_blocks_list=(2, 2, 2),
        is_downsample_block=(None, True, True),
        block_type=("Block", "Block", "BlockESE"),
    ),
    "shvit": _model(
        "shvit.SHViT", embed_dim=(32, 48, 64), partial_dim=(16, 16, 24), depth=(1, 2, 2), types=("i", "s", "s")
    ),
    "swiftformer": _model("swiftformer.SwiftFormer", layers=[1, 1, 2, 1], embed_dims=[16, 24, 32, 48]),
    "vitamin": _model("vitamin_small_224", img_size=64, depth=2),
}
#: Family -> how its tiny model is made.
_MODELS: dict[str, _Model] = {**_TRANSFORMERS, **_CONVOLUTIONS, **_MIXTURES}


def _create(model: _Model) -> nn.Module:
    if "." not in model.source:
        return timm.create_model(model.source, num_classes=CLASSES, **model.settings)
    module, class_name = model.source.split(".")
    make = getattr(importlib.import_module(f"timm.models.{module}"), class_name)
    return make(num_classes=CLASSES, **model.settings)


def _make(family: str) -> nn.Module:
    return build(lambda: wrap_classifier(_create(_MODELS[family])), _inputs(family, rows=8, seed=0))


def _inputs(family: str, rows: int = 4, seed: int = 1, padded: bool = True) -> Batch:
    return labelled_pixels(_MODELS[family].size, rows, seed)


def entries() -> list[Entry]:
    """The entries: transformers, convolutional networks and what mixes both, each in alphabetical order."""
    return [
        Entry(
            name=f"timm/{family}",
            kind="timm",
            family=family,
            make=functools.partial(_make, family),
            inputs=functools.partial(_inputs, family),
        )
        for family in _MODELS
    ]
