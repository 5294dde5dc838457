"""Tiny random models of every causal type of transformers, each from its own config class.

A table gives small values for the fields by name; a few types need more. `tiny(type)` raises Skip with a
reason.
"""

import dataclasses
import inspect

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WIDTH, LAYERS, HEADS = 128, 64, 4, 4
MAX_PARAMETERS = 3_000_000
# Beyond the causal LMs: encoder-decoders, and models of images and text.
OTHERS = {
    "t5": "T5ForConditionalGeneration",
    "bart-seq2seq": "BartForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}


class Skip(Exception):
    """A type of which no tiny model can be made here, and why."""


# Small values by the names of fields; the values of names that stand in several config classes.
_SIZES: list[tuple[int, str]] = [
    (
        VOCABULARY,
        """
        vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base
        """,
    ),
    (
        WIDTH,
        """
        hidden_size d_model n_embd embedding_dim embed_dim emb_dim dim word_embed_proj_dim embedding_size
        input_embedding_size output_embedding_size lru_width attention_hidden_size backbone_hidden_size
        ple_embed_dim mamba_d_ssm
        """,
    ),
    (
        LAYERS,
        """
        encoder_layers num_encoder_layers num_hidden_layers n_layer n_layers num_layers decoder_layers
        num_decoder_layers num_blocks
        """,
    ),
    (
        2,
        """
        num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token
        moe_topk moe_k num_codebooks linear_num_key_heads index_n_heads heads_per_ngram split_ngram_parts
        o_groups mamba_n_groups n_groups mamba_ngroups index_topk_blocks hc_lowrank adapter_rank
        zero_expert_num
        """,
    ),
    (
        HEADS,
        """
        num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        swa_num_attention_heads linear_num_heads num_experts num_local_experts n_routed_experts
        moe_num_experts linear_num_value_heads num_query_groups
        """,
    ),
    (
        WIDTH // HEADS,
        """
        head_dim swa_head_dim qk_head_dim v_head_dim dim_head d_head kv_channels q_lora_rank kv_lora_rank
        index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim attention_head_size
        mamba_d_head mamba_head_dim mamba_headdim o_lora_rank hidden_size_per_layer_input laurel_rank
        router_hidden_size time_step_rank mamba_dt_rank d_rel gated_norm_rank mamba_d_state ssm_state_size
        state_size query_pre_attn_scalar pronunciation_embed_dim shape_embed_dim classifier_proj_size
        num_mel_bins prompt_mid_dim global_head_dim
        """,
    ),
    (
        8,
        """
        qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_chunk_size chunk_size dim_model_base
        """,
    ),
    (
        16,
        """
        sliding_window sliding_window_size window_size attention_window_size local_attention block_size
        attention_chunk_size index_topk max_window_layers keep_window_size rel_extent lsh_attn_chunk_length
        local_attn_chunk_length index_block_size
        """,
    ),
    (
        96,
        """
        intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner
        feed_forward_size intermediate_size_mlp dense_intermediate_size n_inner shared_intermediate_size
        """,
    ),
    (
        32,
        """
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        expert_ffn_hidden_size moe_shared_expert_intermediate_size
        """,
    ),
    (
        1024,
        """
        max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length
        original_max_position_embeddings max_source_positions max_target_positions
        """,
    ),
    (
        1,
        """
        n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts
        first_k_dense_replace num_dense_layers moe_layer_start_index num_kv_shared_layers num_random_blocks
        make_ngram_vocab_size_divisible_by
        """,
    ),
    (
        0,
        """
        pad_token_id num_nextn_predict_layers vision_feature_select_layer
        """,
    ),
]
TABLE: dict[str, object] = {name: value for value, names in _SIZES for name in names.split()} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "decoder_start_token_id": 1,
    "layer_types": None,
    "mlp_layer_types": None,
    "use_cache": True,
    "is_decoder": True,
    "forced_eos_token_id": None,
    "max_window_layers": 2,
    "pronunciation_vocab_size": 16,
    "shape_vocab_size": 16,
    "mamba_expand": 2,
    "expand": 2,
    "begin_suppress_tokens": None,
    "image_token_id": 120,
    "image_token_index": 120,
    "video_token_id": 121,
    "audio_token_id": 122,
    "boi_token_id": 123,
    "eoi_token_id": 124,
    "boa_token_id": 125,
    "eoa_token_id": 126,
    "vision_start_token_id": 123,
    "vision_end_token_id": 124,
    "image_size": 32,
    "patch_size": 8,
    "crop_size": 32,
    "depth": 2,
    "out_hidden_size": WIDTH,
    "projection_dim": WIDTH,
    "num_position_embeddings": 16,
    "mlp_dim": 96,
    "output_channels": 32,
    "ext_pw_out_channel": WIDTH,
    "nemo_conv_channels": WIDTH,
    "depthwise_separable_out_channel": WIDTH,
    "mm_tokens_per_image": 4,
    "image_seq_length": 4,
    "downsample_hidden_size": 16,
    "adapter_in_dim": WIDTH,
    "adapter_out_dim": WIDTH,
    "adapter_input_size": WIDTH,
    "output_proj_dims": WIDTH,
    "prompt_length": 4,
    "axial_pos_shape": [32, 32],
    "axial_pos_embds_dim": [32, 32],
    "boi_token_index": 123,
    "eoi_token_index": 124,
    "eoa_token_index": 126,
    "eod_token_id": 2,
}
# What single types need beyond the table. None: leave the field to the config class.
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
SPECIAL: dict[str, dict[str, object]] = {
    "axk2": {"num_key_value_heads": HEADS},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), MROPE),
    },
    "deepseek_v32": {"num_key_value_heads": HEADS},
    "dots3_note_text": {
        "num_key_value_heads": HEADS,
        "per_layer_config": {},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "falcon_h1": {
        "mamba_n_heads": 4,
        "lm_head_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "mamba_d_ssm": WIDTH,
    },
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
    },
    "glm_moe_dsa": {"num_key_value_heads": HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 96, "moe_top_k": 2},
    },
    "longcat_flash": {"head_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"attn_layers": ["local"] * LAYERS},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": None,
        "attention_head_dim": None,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    # scales of the logits that models of these types have, but their config classes not by default
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "cohere2_moe": {"logit_scale": 0.25},
    "inkling_text": {"logits_mup_width_multiplier": 4.0},
    "inkling2_text": {"logits_mup_width_multiplier": 4.0},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoeshared": {"logits_scaling": 4.0, "shared_intermediate_size": 32},
}


# Types whose config class cannot be called without arguments.
WITHOUT_DEFAULT = {"gemma4_assistant"}
SOUND = "its tokens come from four codebooks of sound, not from text"
UNBUILDABLE = {
    "musicgen": SOUND,
    "musicgen_melody": SOUND,
    "blt": "a byte-level model of three models with hash tables, no token ids of a vocabulary",
    "gemma4_assistant": "an assistant that reads another model's states",
    "gemma4_unified_assistant": "an assistant that reads another model's states",
    "dots3_note": "its vision tower has another layout; dots3_note_text is tested",
    "gemma3n": "its vision tower needs timm; gemma3n_text is tested",
}


def causal_types() -> list[str]:
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def fields_of(kind: type) -> set[str]:
    named = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return named | set(inspect.signature(kind.__init__).parameters)


def tiny_config(kind: type, name: str):
    """A small config; configs inside it (text, vision, audio) are small too."""
    own = SPECIAL.get(name, {})
    given = {k: v for k, v in TABLE.items() if k in fields_of(kind) and k not in own and v is not None}
    if "kv_lora_rank" in given:
        given["num_key_value_heads"] = HEADS
    given |= {k: v for k, v in own.items() if v is not None}
    for key, part in vars(kind()).items() if name not in WITHOUT_DEFAULT else ():
        if isinstance(part, PreTrainedConfig) and key not in given:
            given[key] = tiny_config(type(part), part.model_type)
    return kind(**given)


def tiny(name: str, seed: int = 0):
    """A tiny model in eval mode. Its weights are large enough that tokens and layers differ.

    Raises:
        Skip: it cannot be made.
    """
    if name in UNBUILDABLE:
        raise Skip(UNBUILDABLE[name])
    if name in OTHERS:
        make = getattr(transformers, OTHERS[name])._from_config
        kind = getattr(transformers, OTHERS[name]).config_class
    else:
        make, kind = AutoModelForCausalLM.from_config, CONFIG_MAPPING[name]
    config = tiny_config(kind, name)
    with torch.device("meta"):
        size = sum(p.numel() for p in make(config).parameters())
    if size > MAX_PARAMETERS:
        raise Skip(f"{size:,} parameters, not tiny")
    torch.manual_seed(seed)
    model = enlarged(make(config).float()).eval()
    if name == "xmod":
        model.set_default_language("en_XX")
    return model


@torch.no_grad()
def enlarged(model):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
