"""Tiny configurations of Transformers model types: shrunk by the names of their fields, the exceptions in a table."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

CLASSES = 5
VOCABULARY = 120
#: Tokens 0 to 4 are special: beginning, padding, end, unknown, mask. Batches draw their tokens from 5 on.
BEGIN, PADDING, END, MASK = 0, 1, 2, 4

_HIDDEN, _LAYERS, _HEADS, _INNER, _POSITIONS = 32, 4, 4, 48, 128


def _group(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


#: Field name -> its tiny value, in every configuration that has a number there.
FIELDS: dict[str, Any] = {
    **_group(
        _HIDDEN,
        "hidden_size d_model n_embd dim emb_dim embedding_size d_embed word_embed_proj_dim projection_dim hidden_dim"
        " classifier_proj_size output_hidden_size num_feature hidden_channels",
    ),
    **_group(
        _LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers"
        " num_decoder_layers",
    ),
    **_group(
        _HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
        " num_encoder_attention_heads",
    ),
    **_group(2, "num_key_value_heads num_kv_heads"),
    **_group(
        _INNER,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff n_inner d_inner intermediate_dim"
        " moe_intermediate_size ffn_hidden_size shared_expert_intermediate_size",
    ),
    **_group(
        _POSITIONS,
        "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions seq_length max_seq_len",
    ),
    **_group(8, "head_dim d_kv d_head v_head_dim qk_nope_head_dim qk_rope_head_dim attention_head_size head_size"),
    **_group(16, "q_lora_rank kv_lora_rank sliding_window"),
    **_group(4, "n_routed_experts num_experts num_local_experts"),
    **_group(1, "n_group topk_group"),
    # Large enough that a head's answers differ visibly between rows.
    **_group(0.1, "initializer_range init_std"),
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": 2,
    "image_size": 32,
    "bos_token_id": BEGIN,
    "pad_token_id": PADDING,
    "eos_token_id": END,
}

#: Depths and widths of four stages.
_STAGES = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
_STAGE_HEADS = [1, 2, 2, 4]
_TEXT_TOWER = dict(
    hidden_size=_HIDDEN,
    intermediate_size=_INNER,
    num_hidden_layers=2,
    num_attention_heads=_HEADS,
    vocab_size=60,
    max_position_embeddings=16,
)
_VISION_TOWER = dict(
    hidden_size=_HIDDEN,
    intermediate_size=_INNER,
    num_hidden_layers=_LAYERS,
    num_attention_heads=_HEADS,
    image_size=32,
    patch_size=8,
    num_patches=16,
)
_MAMBA = dict(mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False)
_HYBRID = ["linear_attention", "hybrid"] * 2

#: Model types (several a line share the settings) -> settings that the shrinking by names does not find.
_IMAGE_CASES: dict[str, dict[str, Any]] = {
    "beit data2vec-vision": dict(image_size=32, patch_size=8),
    "bit": dict(embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 2, 1, 1], num_groups=4),
    "clip metaclip_2 siglip siglip2": dict(text_config=_TEXT_TOWER, vision_config=_VISION_TOWER),
    "convnext convnextv2": dict(hidden_sizes=[8, 12, 16, 20], depths=[1, 2, 2, 1]),
    "cvt": dict(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], patch_sizes=[7, 3, 3]),
    "dinat": dict(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 2]),
    "donut-swin swin swinv2": dict(
        embed_dim=16, depths=[1, 1, 3, 1], num_heads=[1, 2, 4, 4], window_size=2, image_size=64
    ),
    "efficientnet": dict(
        width_coefficient=0.3, depth_coefficient=0.5, hidden_dim=384, in_channels=[32, 16, 24, 40, 80, 112, 192]
    ),
    "focalnet": dict(embed_dim=16, depths=[1, 1, 2, 1]),
    "hgnet_v2": dict(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 24],
        stage_mid_channels=[8, 8, 16, 16],
        stage_out_channels=[16, 16, 24, 32],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        hidden_sizes=[16, 16, 24, 32],
        embedding_size=8,
        depths=[1, 1, 2, 1],
    ),
    "hiera": dict(embed_dim=16, depths=[1, 1, 3, 1], num_heads=[1, 1, 2, 2], image_size=[64, 64]),
    "imagegpt": dict(vocab_size=65, n_positions=64, n_inner=None),
    "levit": dict(
        image_size=64,
        patch_size=16,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 3, 4],
        depths=[2, 2, 2],
        key_dim=[8, 8, 8],
    ),
    "mobilenet_v1 mobilenet_v2": dict(depth_multiplier=0.25),
    "mobilevit": dict(
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        image_size=64,
        patch_size=2,
        output_stride=32,
    ),
    "mobilevitv2": dict(image_size=64, width_multiplier=0.25, patch_size=2),
    # The Fourier features of one variant divide into one head only; that variant has no smaller images.
    "perceiver": dict(
        num_latents=8,
        d_latents=_HIDDEN,
        num_blocks=1,
        num_self_attends_per_block=_LAYERS,
        num_self_attention_heads=_HEADS,
        num_cross_attention_heads=1,
        max_position_embeddings=20,
    ),
    "poolformer": dict(**_STAGES, patch_size=7),
    "pp_lcnet": dict(scale=0.25, class_expand=64),
    "pvt": dict(**_STAGES, image_size=64, num_attention_heads=_STAGE_HEADS, patch_sizes=[4, 2, 2, 2]),
    "pvt_v2": dict(**_STAGES, image_size=64, num_attention_heads=_STAGE_HEADS),
    "regnet": dict(**_STAGES, embedding_size=8, groups_width=8),
    "resnet": dict(**_STAGES, embedding_size=8),
    "segformer": dict(**_STAGES, num_attention_heads=_STAGE_HEADS, decoder_hidden_size=16),
    "swiftformer": dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=64),
    "textnet": dict(image_size=64, stem_out_channels=8, hidden_sizes=[8, 8, 16, 24, 32]),
    "timm_wrapper": dict(
        architecture="vit_tiny_patch16_224",
        model_args=dict(img_size=32, patch_size=8, depth=4, embed_dim=48, num_heads=3),
    ),
}
_TEXT_CASES: dict[str, dict[str, Any]] = {
    "albert": dict(embedding_size=16),
    "axk1 axk2 esmc minicpm3 mistral4": dict(num_key_value_heads=4),
    "bart mbart plbart mvp": dict(encoder_layers=3, decoder_layers=3),
    "big_bird bigbird_pegasus": dict(block_size=4, num_random_blocks=1, attention_type="original_full"),
    "canine": dict(
        num_hash_buckets=64,
        num_hash_functions=4,
        downsampling_rate=4,
        upsampling_kernel_size=4,
        local_transformer_stride=16,
    ),
    "cohere_compass_text": dict(
        rope_parameters={
            "full_attention": dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1]),
        },
        layer_types=["full_attention"] * _LAYERS,
    ),
    "deepseek_v2": dict(num_key_value_heads=4, first_k_dense_replace=1, num_experts_per_tok=2),
    "deepseek_v3": dict(num_key_value_heads=4, first_k_dense_replace=1, n_group=2, topk_group=1),
    "esm": dict(
        position_embedding_type="rotary",
        is_folding_model=False,
        esmfold_config=None,
        vocab_list=None,
        vocab_size=40,
        mask_token_id=MASK,
    ),
    "flaubert xlm": dict(n_langs=1, max_position_embeddings=64),
    "funnel": dict(block_sizes=[1, 2, 2], num_decoder_layers=1),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=8, intermediate_size=None),
    "gptj": dict(rotary_dim=4),
    "hunyuan_v1_dense hunyuan_v1_moe ministral": dict(head_dim=8),
    "jamba": dict(**_MAMBA, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2),
    "layoutlm": dict(max_2d_position_embeddings=64),
    "layoutlmv2": dict(max_2d_position_embeddings=64, coordinate_size=6, shape_size=4),
    "layoutlmv3": dict(
        max_2d_position_embeddings=64, coordinate_size=6, shape_size=4, input_size=32, patch_size=8, visual_embed=True
    ),
    "lilt": dict(max_2d_position_embeddings=64, channel_shrink_ratio=4, hidden_size=48),
    "longformer": dict(attention_window=8),
    "luke": dict(entity_vocab_size=20, entity_emb_size=16),
    "markuplm": dict(
        max_depth=8,
        max_xpath_tag_unit_embeddings=20,
        max_xpath_subs_unit_embeddings=20,
        xpath_unit_hidden_size=8,
        tag_pad_id=5,
        subs_pad_id=5,
    ),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1, state_size=8, chunk_size=8),
    "minimax": dict(block_size=8),
    "mistral4": dict(head_dim=16, qk_head_dim=16),
    "mobilebert": dict(intra_bottleneck_size=16, embedding_size=16, true_hidden_size=16, intermediate_size=24),
    "mt5 t5 umt5": dict(num_layers=3, num_decoder_layers=3, decoder_start_token_id=BEGIN),
    "nemotron": dict(head_dim=8, num_key_value_heads=2),
    "qwen3_5_vision": dict(depth=2, out_hidden_size=_HIDDEN, num_position_embeddings=64),
    "qwen3_5_text qwen3_next": dict(
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        partial_rotary_factor=0.5,
    ),
    "reformer": dict(
        axial_pos_shape=[4, 8],
        axial_pos_embds_dim=[16, 16],
        attn_layers=["local", "lsh", "local", "lsh"],
        feed_forward_size=_INNER,
        num_buckets=2,
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
        max_position_embeddings=32,
        hash_seed=0,
    ),
    "roc_bert": dict(pronunciation_vocab_size=30, shape_vocab_size=30, pronunciation_embed_dim=16, shape_embed_dim=16),
    "tapas": dict(type_vocab_sizes=[3, 16, 16, 2, 16, 10, 10]),
    "xmod": dict(languages=["en_XX", "de_DE"], default_language="en_XX"),
    "zamba": dict(
        **_MAMBA, n_mamba_heads=2, attention_hidden_size=64, attention_head_dim=16, layers_block_type=_HYBRID
    ),
    "zamba2": dict(
        **_MAMBA,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=1,
        mamba_expand=2,
        chunk_size=8,
        num_mem_blocks=1,
        attention_hidden_size=64,
        attention_head_dim=16,
        layers_block_type=_HYBRID,
    ),
}
_SPEECH = dict(
    conv_dim=[16, 16, 16],
    conv_kernel=[8, 4, 4],
    conv_stride=[4, 4, 2],
    conv_pos_kernel_size=5,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    classifier_proj_size=16,
    tdnn_dim=[16] * 5,
    xvector_output_dim=16,
    num_codevectors_per_group=16,
    codevector_dim=16,
    proj_codevector_dim=16,
)
_AUDIO_CASES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": dict(
        max_length=32, num_mel_bins=16, patch_size=8, frequency_stride=4, time_stride=4
    ),
    "data2vec-audio": {**_SPEECH, "num_conv_pos_embeddings": 2},
    "hubert unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm": _SPEECH,
    "sew": dict(**_SPEECH, squeeze_factor=2),
    "sew-d": dict(**_SPEECH, squeeze_factor=1, position_buckets=16),
    "wav2vec2-bert": dict(
        feature_projection_input_dim=16, conv_depthwise_kernel_size=5, tdnn_dim=[16] * 5, xvector_output_dim=16
    ),
    "whisper": dict(num_mel_bins=16, max_source_positions=16, decoder_start_token_id=BEGIN),
}


def _cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for table in (_IMAGE_CASES, _TEXT_CASES, _AUDIO_CASES):
        for names, settings in table.items():
            for name in names.split():
                cases.setdefault(name, {}).update(settings)
    return cases


#: Model type -> its settings beyond `FIELDS`.
CASES: dict[str, dict[str, Any]] = _cases()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that get another value, those of the configurations inside it included."""
    fields = config.to_dict()
    small = {name: FIELDS[name] for name, value in fields.items() if name in FIELDS and _is_number(value)}
    if isinstance(fields.get("patch_size"), int):
        small["patch_size"] = 4 if fields["patch_size"] <= 8 else 8
    # Many configurations leave their tokens open; a classifier of several rows needs a padding token.
    tokens = {"bos_token_id": BEGIN, "pad_token_id": PADDING, "eos_token_id": END}
    small.update({name: token for name, token in tokens.items() if name in fields})
    if fields.get("sep_token_id") is not None:
        small["sep_token_id"] = END
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PretrainedConfig):
            small[name] = {
                "model_type": inner.model_type,
                **_shrunk(inner),
                **CASES.get(inner.model_type, {}),
            }
    return small


def tiny_config(model_type: str, **settings: Any) -> PretrainedConfig:
    """The tiny configuration of a model type.

    Args:
        model_type: as `config.model_type`, e.g. `"deberta-v2"`.
        settings: more fields, which win.

    Returns:
        The configuration, with `num_labels` of `CLASSES`.
    """
    config_class = CONFIG_MAPPING[model_type]
    fields = {**_shrunk(config_class()), **CASES.get(model_type, {})}
    return config_class(**{**fields, "num_labels": CLASSES, **settings})
