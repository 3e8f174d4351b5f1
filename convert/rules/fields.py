"""Fields of config.json that no family reads: refused, said to be unread, or harmless.

The names are those of published models.
"""

from __future__ import annotations

import reprlib
from collections.abc import Set
from typing import Any

from convert.source import ConversionError

# Unless null, false, zero or empty, each asks for something that is not computed here.
_SWITCHES = frozenset(
    """
    attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar clip_qkv
    attention_multiplier attn_temperature_tuning attention_chunk_size
    use_bidirectional_attention use_sliding_window sliding_window_pattern

    alibi llama_4_scaling_beta mrope_section no_rope_layers rope_interleave
    rope_interleaved rope_local_base_freq use_mrope

    activation_sparsity_pattern hidden_activation mlp_bias
    apply_residual_connection_post_layernorm qk_layernorm use_qk_norm
    parallel_attn use_parallel_residual
    scale_depth dim_model_base scale_embedding

    decoder_sparse_step interleave_moe_layer_step moe_intermediate_size moe_layers
    moe_num_experts n_routed_experts n_shared_experts num_experts num_experts_per_tok
    num_local_experts shared_expert_intermediate_size

    add_cross_attention is_encoder_decoder kv_lora_rank num_kv_shared_layers
    per_layer_config pruned_heads q_lora_rank use_cla
    """.split()
)
# Multiplied with or divided by: one changes nothing.
_FACTORS = frozenset(
    """
    embedding_multiplier residual_multiplier logits_scaling logit_scale scale_emb
    attention_in_multiplier attention_out_multiplier key_multiplier lm_head_multiplier
    rotary_pct
    """.split()
)
# Of weights that stand for others; whoever reads a configuration refuses them. The
# second is compressed-tensors' old word, the third MLX's.
QUANTIZATIONS = ("quantization_config", "compression_config", "quantization")
# Of bookkeeping, training and drawing tokens; or looked at before a family reads.
_HARMLESS = frozenset(
    """
    _name_or_path architectures bos_token_id dtype eos_token_id id2label is_llama_config
    label2id model_type name_or_path pad_token_id problem_type sep_token_id
    task_specific_params tokenizer_class torch_dtype transformers.js_config
    transformers_version unk_token_id unsloth_fixed unsloth_version

    activation_dropout attention_dropout dropout embd_pdrop gradient_checkpointing
    hidden_dropout init_std initializer_factor initializer_range layerdrop resid_pdrop

    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    attn_implementation chunk_size_feed_forward is_decoder output_attentions
    output_hidden_states prefix pretraining_tp return_dict return_dict_in_generate
    tie_encoder_decoder tie_last_hidden_states torchscript use_bfloat16 use_cache

    do_sample max_length max_new_tokens min_length num_beams repetition_penalty
    temperature top_k top_p
    """.split()
) | set(QUANTIZATIONS)


def unread_fields(config: dict[str, Any], read: Set[str]) -> list[str]:
    """Look at what a family's reader does not.

    Args:
      config: what config.json holds, or a record in it.
      read: names that the family's reader knows.

    Returns:
      Fields with a value that nobody knows.

    Raises:
      ConversionError: naming one that asks for what is not computed here.
    """
    unread = []
    for name, value in config.items():
        if value is None or name in read or name in _HARMLESS:
            continue
        if (name in _SWITCHES and value) or (name in _FACTORS and value != 1):
            raise ConversionError(
                f"configuration: {name} {reprlib.repr(value)} is not supported: it "
                "changes what the model computes"
            )
        if name not in _SWITCHES and name not in _FACTORS:
            unread.append(name)
    return unread
