"""Headers of real architectures, written small: names as they stand in published checkpoints.

One line a tensor: role letter, name, shape, and options. In a name `#` stands for every layer and
`@` for every expert (two of each). `+b` adds the bias, `:I64` sets the dtype (F32 by default).

    L linear  C convolution  T transposed linear of GPT-2  X fused experts  E embedding  H head
    P position  R router  N norm  B bias  S state  U unclear
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from compress.tensor import Role, TensorInfo

LETTERS = {
    "L": Role.LINEAR, "C": Role.CONV, "T": Role.CONV1D, "X": Role.EXPERTS, "E": Role.EMBEDDING,
    "H": Role.HEAD, "P": Role.POSITION, "R": Role.ROUTER, "N": Role.NORM, "B": Role.BIAS,
    "S": Role.STATE, "U": Role.UNCLEAR,
}  # fmt: skip
_BYTES = {"I64": 8, "F32": 4, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Architecture:
    """A header and the role that each of its tensors must get."""

    name: str
    config: dict[str, Any]
    infos: list[TensorInfo]
    roles: dict[str, Role]


def _expand(name: str, config: dict[str, Any], text: str) -> Architecture:
    infos: list[TensorInfo] = []
    roles: dict[str, Role] = {}

    def add(tensor: str, dtype: str, shape: tuple[int, ...], role: Role) -> None:
        nbytes = math.prod(shape) * _BYTES[dtype]
        infos.append(TensorInfo(tensor, "model.safetensors", dtype, shape, nbytes))
        roles[tensor] = role

    for line in filter(None, text.splitlines()):
        letter, template, size, *options = line.split()
        shape = tuple(int(number) for number in size.split("x")) if size != "-" else ()
        dtype = next((option[1:] for option in options if option[0] == ":"), "F32")
        layers = range(2) if "#" in template else range(1)
        experts = range(2) if "@" in template else range(1)
        for layer, expert in itertools.product(layers, experts):
            tensor = template.replace("#", str(layer)).replace("@", str(expert))
            add(tensor, dtype, shape, LETTERS[letter])
            if "+b" in options:
                length = shape[1] if letter == "T" else shape[0]
                add(tensor.removesuffix("weight") + "bias", "F32", (length,), Role.BIAS)
    return Architecture(name, config, infos, roles)


def _decoder(mlp: str, attention: str = "") -> str:
    """A Llama-like decoder around the given MLP lines."""
    attention = (
        attention
        or """
L model.layers.#.self_attn.q_proj.weight 64x64
L model.layers.#.self_attn.k_proj.weight 32x64
L model.layers.#.self_attn.v_proj.weight 32x64"""
    )
    return f"""
E model.embed_tokens.weight 1000x64
N model.layers.#.input_layernorm.weight 64
{attention.strip()}
L model.layers.#.self_attn.o_proj.weight 64x64
N model.layers.#.post_attention_layernorm.weight 64
{mlp.strip()}
N model.norm.weight 64
H lm_head.weight 1000x64
"""


_LM_HEAD = "H lm_head.weight 1000x64\n"
_GATED = """
L model.layers.#.mlp.gate_proj.weight 160x64
L model.layers.#.mlp.up_proj.weight 160x64
L model.layers.#.mlp.down_proj.weight 64x160
"""
_EXPERTS = """
R model.layers.#.mlp.gate.weight 2x64
L model.layers.#.mlp.experts.@.gate_proj.weight 48x64
L model.layers.#.mlp.experts.@.up_proj.weight 48x64
L model.layers.#.mlp.experts.@.down_proj.weight 64x48
"""


def _encoder(prefix: str, layer: str, head: str) -> str:
    """A BERT-like encoder."""
    base = f"{prefix}{layer}.#"
    return f"""
E {prefix}embeddings.word_embeddings.weight 1000x64
P {prefix}embeddings.position_embeddings.weight 512x64
P {prefix}embeddings.token_type_embeddings.weight 2x64
N {prefix}embeddings.LayerNorm.weight 64 +b
S {prefix}embeddings.position_ids 1x512 :I64
L {base}.attention.self.query.weight 64x64 +b
L {base}.attention.self.key.weight 64x64 +b
L {base}.attention.self.value.weight 64x64 +b
L {base}.attention.output.dense.weight 64x64 +b
N {base}.attention.output.LayerNorm.weight 64 +b
L {base}.intermediate.dense.weight 256x64 +b
L {base}.output.dense.weight 64x256 +b
N {base}.output.LayerNorm.weight 64 +b
{head.strip()}
"""


def _falcon_like(embedding: str, layers: str, attention: str, extra: str) -> str:
    return f"""
E {embedding} 1000x64
L {layers}.#.{attention}.query_key_value.weight 192x64 +b
L {layers}.#.{attention}.dense.weight 64x64 +b
L {layers}.#.mlp.dense_h_to_4h.weight 256x64 +b
L {layers}.#.mlp.dense_4h_to_h.weight 64x256 +b
N {layers}.#.input_layernorm.weight 64 +b
{extra.strip()}
"""


def _t5_block(side: str, layer: int, name: str) -> str:
    return "\n".join(
        f"L {side}.block.#.layer.{layer}.{name}.{leaf}.weight 64x64" for leaf in "qkvo"
    )


def _attention(prefix: str, out: str = "out_proj") -> str:
    return "\n".join(
        f"L {prefix}.{leaf}.weight 64x64 +b" for leaf in ("k_proj", "v_proj", "q_proj", out)
    )


_LLAMA_CONFIG = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64}
_MOE_CONFIG = {**_LLAMA_CONFIG, "num_experts": 2, "moe_intermediate_size": 48}

_SOURCES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("llama", _LLAMA_CONFIG, _decoder(_GATED)),
    ("llama2_rotary", _LLAMA_CONFIG,
     _decoder(_GATED) + "S model.layers.#.self_attn.rotary_emb.inv_freq 8"),
    ("llama_original", {}, """
E tok_embeddings.weight 1000x64
L layers.#.attention.wq.weight 64x64
L layers.#.attention.wk.weight 32x64
L layers.#.attention.wv.weight 32x64
L layers.#.attention.wo.weight 64x64
L layers.#.feed_forward.w1.weight 160x64
L layers.#.feed_forward.w2.weight 64x160
L layers.#.feed_forward.w3.weight 160x64
N layers.#.attention_norm.weight 64
N layers.#.ffn_norm.weight 64
N norm.weight 64
H output.weight 1000x64
"""),
    ("mistral_tied", {**_LLAMA_CONFIG, "model_type": "mistral", "tie_word_embeddings": True},
     _decoder(_GATED).replace(_LM_HEAD, "")),
    ("qwen2", {**_LLAMA_CONFIG, "model_type": "qwen2"}, _decoder(_GATED, """
L model.layers.#.self_attn.q_proj.weight 64x64 +b
L model.layers.#.self_attn.k_proj.weight 32x64 +b
L model.layers.#.self_attn.v_proj.weight 32x64 +b""")),
    ("qwen3_moe", {**_MOE_CONFIG, "model_type": "qwen3_moe"}, _decoder(_EXPERTS + """
N model.layers.#.self_attn.q_norm.weight 16
N model.layers.#.self_attn.k_norm.weight 16""")),
    ("qwen2_moe", {**_MOE_CONFIG, "model_type": "qwen2_moe"}, _decoder(_EXPERTS + """
R model.layers.#.mlp.shared_expert_gate.weight 1x64
L model.layers.#.mlp.shared_expert.gate_proj.weight 48x64
L model.layers.#.mlp.shared_expert.up_proj.weight 48x64
L model.layers.#.mlp.shared_expert.down_proj.weight 64x48""")),
    ("mixtral", {**_LLAMA_CONFIG, "model_type": "mixtral", "num_local_experts": 2}, _decoder("""
R model.layers.#.block_sparse_moe.gate.weight 2x64
L model.layers.#.block_sparse_moe.experts.@.w1.weight 160x64
L model.layers.#.block_sparse_moe.experts.@.w2.weight 64x160
L model.layers.#.block_sparse_moe.experts.@.w3.weight 160x64""")),
    ("mixtral_fused", {**_LLAMA_CONFIG, "model_type": "mixtral"}, _decoder("""
R model.layers.#.mlp.router.weight 4x64
X model.layers.#.mlp.experts.gate_up_proj 4x320x64
X model.layers.#.mlp.experts.down_proj 4x64x160""")),
    ("granite_moe", {**_LLAMA_CONFIG, "model_type": "granitemoe"}, _decoder("""
R model.layers.#.block_sparse_moe.router.layer.weight 4x64
X model.layers.#.block_sparse_moe.input_linear.weight 4x96x64
X model.layers.#.block_sparse_moe.output_linear.weight 4x64x48""")),
    ("llama4", {"model_type": "llama4", "text_config": _LLAMA_CONFIG}, _decoder("""
R model.layers.#.feed_forward.router.weight 4x64
U model.layers.#.feed_forward.experts.gate_up_proj 4x64x320
U model.layers.#.feed_forward.experts.down_proj 4x160x64
L model.layers.#.feed_forward.shared_expert.gate_proj.weight 160x64""")),
    ("gpt_oss", {**_LLAMA_CONFIG, "model_type": "gpt_oss"}, _decoder("""
S model.layers.#.self_attn.sinks 4
R model.layers.#.mlp.router.weight 4x64 +b
U model.layers.#.mlp.experts.gate_up_proj 4x64x128
B model.layers.#.mlp.experts.gate_up_proj_bias 4x128
U model.layers.#.mlp.experts.down_proj 4x64x64
B model.layers.#.mlp.experts.down_proj_bias 4x64""")),
    ("deepseek_v3", {**_MOE_CONFIG, "model_type": "deepseek_v3", "n_routed_experts": 2},
     _decoder(_EXPERTS + """
B model.layers.#.mlp.gate.e_score_correction_bias 2
L model.layers.#.mlp.shared_experts.gate_proj.weight 48x64
L model.layers.#.mlp.shared_experts.up_proj.weight 48x64
L model.layers.#.mlp.shared_experts.down_proj.weight 64x48
E model.layers.2.embed_tokens.weight 1000x64
N model.layers.2.enorm.weight 64
N model.layers.2.hnorm.weight 64
L model.layers.2.eh_proj.weight 64x128
N model.layers.2.shared_head.norm.weight 64
H model.layers.2.shared_head.head.weight 1000x64""", """
L model.layers.#.self_attn.q_a_proj.weight 24x64
N model.layers.#.self_attn.q_a_layernorm.weight 24
L model.layers.#.self_attn.q_b_proj.weight 96x24
L model.layers.#.self_attn.kv_a_proj_with_mqa.weight 20x64
N model.layers.#.self_attn.kv_a_layernorm.weight 16
L model.layers.#.self_attn.kv_b_proj.weight 128x16""")),
    ("deepseek_v2", {**_MOE_CONFIG, "model_type": "deepseek_v2", "n_routed_experts": 2},
     _decoder(_EXPERTS, """
L model.layers.#.self_attn.q_proj.weight 96x64
L model.layers.#.self_attn.kv_a_proj_with_mqa.weight 20x64
N model.layers.#.self_attn.kv_a_layernorm.weight 16
L model.layers.#.self_attn.kv_b_proj.weight 128x16""")),
    ("gemma2", {**_LLAMA_CONFIG, "model_type": "gemma2"}, _decoder(_GATED + """
N model.layers.#.pre_feedforward_layernorm.weight 64
N model.layers.#.post_feedforward_layernorm.weight 64""").replace(_LM_HEAD, "")),
    ("phi3", {**_LLAMA_CONFIG, "model_type": "phi3"}, _decoder("""
L model.layers.#.mlp.gate_up_proj.weight 320x64
L model.layers.#.mlp.down_proj.weight 64x160""", """
L model.layers.#.self_attn.qkv_proj.weight 128x64""")),
    ("gpt2", {"model_type": "gpt2", "vocab_size": 1000, "n_embd": 64}, """
E wte.weight 1000x64
P wpe.weight 512x64
N h.#.ln_1.weight 64 +b
S h.#.attn.bias 1x1x512x512
T h.#.attn.c_attn.weight 64x192 +b
T h.#.attn.c_proj.weight 64x64 +b
N h.#.ln_2.weight 64 +b
T h.#.mlp.c_fc.weight 64x256 +b
T h.#.mlp.c_proj.weight 256x64 +b
N ln_f.weight 64 +b
"""),
    ("gpt_bigcode", {"model_type": "gpt_bigcode", "vocab_size": 1000, "n_embd": 64}, """
E transformer.wte.weight 1000x64
P transformer.wpe.weight 512x64
L transformer.h.#.attn.c_attn.weight 96x64 +b
L transformer.h.#.attn.c_proj.weight 64x64 +b
L transformer.h.#.mlp.c_fc.weight 256x64 +b
L transformer.h.#.mlp.c_proj.weight 64x256 +b
H lm_head.weight 1000x64
"""),
    ("gpt_neo", {"model_type": "gpt_neo", "vocab_size": 1000, "hidden_size": 64}, """
E transformer.wte.weight 1000x64
P transformer.wpe.weight 512x64
S transformer.h.#.attn.attention.bias 1x1x512x512 :U8
S transformer.h.#.attn.attention.masked_bias -
L transformer.h.#.attn.attention.q_proj.weight 64x64
L transformer.h.#.attn.attention.out_proj.weight 64x64 +b
L transformer.h.#.mlp.c_fc.weight 256x64 +b
L transformer.h.#.mlp.c_proj.weight 64x256 +b
N transformer.ln_f.weight 64 +b
"""),
    ("gpt_neox", {"model_type": "gpt_neox", "vocab_size": 1000, "hidden_size": 64},
     _falcon_like("gpt_neox.embed_in.weight", "gpt_neox.layers", "attention", """
S gpt_neox.layers.#.attention.bias 1x1x512x512 :BOOL
S gpt_neox.layers.#.attention.masked_bias -
S gpt_neox.layers.#.attention.rotary_emb.inv_freq 8
N gpt_neox.final_layer_norm.weight 64 +b
H embed_out.weight 1000x64""")),
    ("bloom", {"model_type": "bloom", "vocab_size": 1000, "hidden_size": 64},
     _falcon_like("word_embeddings.weight", "h", "self_attention", """
N word_embeddings_layernorm.weight 64 +b
N h.#.post_attention_layernorm.weight 64 +b
N ln_f.weight 64 +b""")),
    ("falcon", {"model_type": "falcon", "vocab_size": 1000, "hidden_size": 64},
     _falcon_like("transformer.word_embeddings.weight", "transformer.h", "self_attention", """
N transformer.h.#.ln_attn.weight 64 +b
N transformer.h.#.ln_mlp.weight 64 +b
H lm_head.weight 1000x64""")),
    ("opt", {"model_type": "opt", "vocab_size": 1000, "hidden_size": 64}, f"""
E model.decoder.embed_tokens.weight 1000x32
P model.decoder.embed_positions.weight 514x64
L model.decoder.project_in.weight 64x32
L model.decoder.project_out.weight 32x64
{_attention("model.decoder.layers.#.self_attn")}
N model.decoder.layers.#.self_attn_layer_norm.weight 64 +b
L model.decoder.layers.#.fc1.weight 256x64 +b
L model.decoder.layers.#.fc2.weight 64x256 +b
N model.decoder.layers.#.final_layer_norm.weight 64 +b
"""),
    ("bert", {"model_type": "bert", "vocab_size": 1000, "hidden_size": 64},
     _encoder("bert.", "encoder.layer", """
B cls.predictions.bias 1000
L cls.predictions.transform.dense.weight 64x64 +b
N cls.predictions.transform.LayerNorm.weight 64 +b
H cls.predictions.decoder.weight 1000x64 +b
L cls.seq_relationship.weight 2x64 +b
L bert.pooler.dense.weight 64x64 +b""")),
    ("bert_tensorflow_names", {"model_type": "bert", "vocab_size": 1000, "hidden_size": 64}, """
E bert.embeddings.word_embeddings.weight 1000x64
N bert.embeddings.LayerNorm.gamma 64
N bert.embeddings.LayerNorm.beta 64
L bert.encoder.layer.#.intermediate.dense.weight 256x64 +b
"""),
    ("minilm", {"model_type": "bert", "vocab_size": 1000, "hidden_size": 64},
     _encoder("", "encoder.layer", "L pooler.dense.weight 64x64 +b")),
    ("roberta", {"model_type": "roberta", "vocab_size": 1000, "hidden_size": 64},
     _encoder("roberta.", "encoder.layer", """
B lm_head.bias 1000
L lm_head.dense.weight 64x64 +b
N lm_head.layer_norm.weight 64 +b
H lm_head.decoder.weight 1000x64 +b""")),
    ("roberta_classifier", {"model_type": "roberta", "vocab_size": 1000, "hidden_size": 64},
     _encoder("roberta.", "encoder.layer", """
L classifier.dense.weight 64x64 +b
L classifier.out_proj.weight 3x64 +b""")),
    ("distilbert", {"model_type": "distilbert", "vocab_size": 1000, "dim": 64}, """
E distilbert.embeddings.word_embeddings.weight 1000x64
P distilbert.embeddings.position_embeddings.weight 512x64
L distilbert.transformer.layer.#.attention.q_lin.weight 64x64 +b
L distilbert.transformer.layer.#.attention.k_lin.weight 64x64 +b
L distilbert.transformer.layer.#.attention.v_lin.weight 64x64 +b
L distilbert.transformer.layer.#.attention.out_lin.weight 64x64 +b
N distilbert.transformer.layer.#.sa_layer_norm.weight 64 +b
L distilbert.transformer.layer.#.ffn.lin1.weight 256x64 +b
L distilbert.transformer.layer.#.ffn.lin2.weight 64x256 +b
N distilbert.transformer.layer.#.output_layer_norm.weight 64 +b
L vocab_transform.weight 64x64 +b
N vocab_layer_norm.weight 64 +b
H vocab_projector.weight 1000x64 +b
"""),
    ("deberta_v2", {"model_type": "deberta-v2", "vocab_size": 1000, "hidden_size": 64}, """
E deberta.embeddings.word_embeddings.weight 1000x64
L deberta.encoder.layer.#.attention.self.query_proj.weight 64x64 +b
L deberta.encoder.layer.#.attention.self.key_proj.weight 64x64 +b
L deberta.encoder.layer.#.attention.self.value_proj.weight 64x64 +b
L deberta.encoder.layer.#.attention.output.dense.weight 64x64 +b
P deberta.encoder.rel_embeddings.weight 512x64
N deberta.encoder.LayerNorm.weight 64 +b
C deberta.encoder.conv.conv.weight 64x64x3 +b
L pooler.dense.weight 64x64 +b
L classifier.weight 3x64 +b
"""),
    ("electra", {"model_type": "electra", "vocab_size": 1000, "hidden_size": 64}, """
E electra.embeddings.word_embeddings.weight 1000x32
P electra.embeddings.token_type_embeddings.weight 2x32
L electra.embeddings_project.weight 64x32 +b
L generator_predictions.dense.weight 32x64 +b
H generator_lm_head.weight 1000x32 +b
"""),
    ("albert", {"model_type": "albert", "vocab_size": 1000, "hidden_size": 64}, """
E albert.embeddings.word_embeddings.weight 1000x32
L albert.encoder.embedding_hidden_mapping_in.weight 64x32 +b
L albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight 256x64 +b
L albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight 64x256 +b
N albert.encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm.weight 64 +b
L predictions.dense.weight 32x64 +b
H predictions.decoder.weight 1000x32 +b
"""),
    ("modernbert", {"model_type": "modernbert", "vocab_size": 1000, "hidden_size": 64}, """
E model.embeddings.tok_embeddings.weight 1000x64
N model.embeddings.norm.weight 64
L model.layers.#.attn.Wqkv.weight 192x64
L model.layers.#.attn.Wo.weight 64x64
N model.layers.#.mlp_norm.weight 64
L model.layers.#.mlp.Wi.weight 512x64
L model.layers.#.mlp.Wo.weight 64x256
L head.dense.weight 64x64
B decoder.bias 1000
"""),
    ("t5", {"model_type": "t5", "vocab_size": 1000, "d_model": 64}, f"""
E shared.weight 1000x64
E encoder.embed_tokens.weight 1000x64
{_t5_block("encoder", 0, "SelfAttention")}
P encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight 32x4
N encoder.block.#.layer.0.layer_norm.weight 64
L encoder.block.#.layer.1.DenseReluDense.wi_0.weight 160x64
L encoder.block.#.layer.1.DenseReluDense.wi_1.weight 160x64
L encoder.block.#.layer.1.DenseReluDense.wo.weight 64x160
{_t5_block("decoder", 1, "EncDecAttention")}
N decoder.final_layer_norm.weight 64
H lm_head.weight 1000x64
"""),
    ("bart", {"model_type": "bart", "vocab_size": 1000, "d_model": 64}, f"""
B final_logits_bias 1x1000
E model.shared.weight 1000x64
P model.encoder.embed_positions.weight 514x64
{_attention("model.decoder.layers.#.encoder_attn")}
N model.encoder.layernorm_embedding.weight 64 +b
L model.encoder.layers.#.fc1.weight 256x64 +b
"""),
    ("whisper", {"model_type": "whisper", "vocab_size": 1000, "d_model": 64}, f"""
C model.encoder.conv1.weight 64x80x3 +b
C model.encoder.conv2.weight 64x64x3 +b
P model.encoder.embed_positions.weight 150x64
{_attention("model.encoder.layers.#.self_attn")}
L model.encoder.layers.#.fc1.weight 256x64 +b
E model.decoder.embed_tokens.weight 1000x64
P model.decoder.embed_positions.weight 448x64
{_attention("model.decoder.layers.#.encoder_attn")}
N model.decoder.layer_norm.weight 64 +b
H proj_out.weight 1000x64
"""),
    ("wav2vec2", {"model_type": "wav2vec2", "vocab_size": 32, "hidden_size": 64}, f"""
P wav2vec2.masked_spec_embed 64
C wav2vec2.feature_extractor.conv_layers.#.conv.weight 32x1x10
N wav2vec2.feature_extractor.conv_layers.#.layer_norm.weight 32 +b
N wav2vec2.feature_projection.layer_norm.weight 32 +b
L wav2vec2.feature_projection.projection.weight 64x32 +b
U wav2vec2.encoder.pos_conv_embed.conv.weight_g 1x1x128
U wav2vec2.encoder.pos_conv_embed.conv.weight_v 64x4x128
{_attention("wav2vec2.encoder.layers.#.attention")}
L wav2vec2.encoder.layers.#.feed_forward.intermediate_dense.weight 256x64 +b
H lm_head.weight 32x64 +b
"""),
    ("vit", {"model_type": "vit", "hidden_size": 64}, """
P vit.embeddings.cls_token 1x1x64
P vit.embeddings.position_embeddings 1x197x64
C vit.embeddings.patch_embeddings.projection.weight 64x3x16x16 +b
L vit.encoder.layer.#.attention.attention.query.weight 64x64 +b
L vit.encoder.layer.#.attention.attention.key.weight 64x64 +b
L vit.encoder.layer.#.attention.attention.value.weight 64x64 +b
L vit.encoder.layer.#.attention.output.dense.weight 64x64 +b
L vit.encoder.layer.#.intermediate.dense.weight 256x64 +b
N vit.encoder.layer.#.layernorm_before.weight 64 +b
N vit.layernorm.weight 64 +b
L classifier.weight 1000x64 +b
"""),
    ("timm_vit", {}, """
P cls_token 1x1x64
P pos_embed 1x197x64
C patch_embed.proj.weight 64x3x16x16 +b
N blocks.#.norm1.weight 64 +b
L blocks.#.attn.qkv.weight 192x64 +b
L blocks.#.attn.proj.weight 64x64 +b
S blocks.#.ls1.gamma 64
L blocks.#.mlp.fc1.weight 256x64 +b
L head.weight 1000x64 +b
"""),
    ("clip", {"model_type": "clip", "text_config": {"hidden_size": 64, "vocab_size": 1000},
              "vision_config": {"hidden_size": 64}}, f"""
S logit_scale -
S text_model.embeddings.position_ids 1x77 :I64
E text_model.embeddings.token_embedding.weight 1000x64
P text_model.embeddings.position_embedding.weight 77x64
{_attention("text_model.encoder.layers.#.self_attn")}
N text_model.encoder.layers.#.layer_norm1.weight 64 +b
L text_model.encoder.layers.#.mlp.fc1.weight 256x64 +b
P vision_model.embeddings.class_embedding 64
C vision_model.embeddings.patch_embedding.weight 64x3x32x32
P vision_model.embeddings.position_embedding.weight 50x64
N vision_model.pre_layrnorm.weight 64 +b
L visual_projection.weight 48x64
L text_projection.weight 48x64
"""),
    ("swin", {"model_type": "swin"}, """
C swin.embeddings.patch_embeddings.projection.weight 32x3x4x4 +b
P swin.encoder.layers.#.blocks.0.attention.self.relative_position_bias_table 169x2
S swin.encoder.layers.#.blocks.0.attention.self.relative_position_index 49x49 :I64
L swin.encoder.layers.#.blocks.0.attention.self.query.weight 32x32 +b
L swin.encoder.layers.0.downsample.reduction.weight 64x128
L classifier.weight 1000x64 +b
"""),
    ("dinov2", {"model_type": "dinov2", "hidden_size": 64}, """
P embeddings.mask_token 1x64
P embeddings.register_tokens 1x4x64
S encoder.layer.#.layer_scale1.lambda1 64
L encoder.layer.#.mlp.fc1.weight 256x64 +b
"""),
    ("convnext", {"model_type": "convnext"}, """
C convnext.embeddings.patch_embeddings.weight 16x3x4x4 +b
C convnext.encoder.stages.#.layers.0.dwconv.weight 16x1x7x7 +b
S convnext.encoder.stages.#.layers.0.layer_scale_parameter 16
L convnext.encoder.stages.#.layers.0.pwconv1.weight 64x16 +b
L convnext.encoder.stages.#.layers.0.pwconv2.weight 16x64 +b
N convnext.encoder.stages.1.downsampling_layer.0.weight 16 +b
C convnext.encoder.stages.1.downsampling_layer.1.weight 32x16x2x2 +b
L classifier.weight 1000x128 +b
"""),
    ("torchvision_resnet", {}, """
C conv1.weight 64x3x7x7
N bn1.weight 64 +b
S bn1.running_mean 64
S bn1.running_var 64
S bn1.num_batches_tracked - :I64
C layer1.#.conv1.weight 64x64x3x3
N layer1.#.bn2.weight 64 +b
C layer2.0.downsample.0.weight 128x64x1x1
N layer2.0.downsample.1.weight 128 +b
L fc.weight 1000x512 +b
"""),
    ("resnet20_cifar", {}, """
C module.conv1.weight 16x3x3x3
N module.bn1.weight 16 +b
S module.bn1.running_var 16
C module.layer1.#.conv1.weight 16x16x3x3
L module.linear.weight 10x64 +b
"""),
    ("mobilenet_v2", {}, """
C features.0.0.weight 32x3x3x3
N features.0.1.weight 32 +b
C features.1.conv.0.0.weight 32x1x3x3
C features.1.conv.1.weight 16x32x1x1
L classifier.1.weight 1000x1280 +b
"""),
    ("vgg", {}, """
C features.0.weight 64x3x3x3 +b
L classifier.0.weight 128x512 +b
L classifier.6.weight 1000x128 +b
"""),
    ("mamba", {"model_type": "mamba", "vocab_size": 1000, "hidden_size": 64}, """
E backbone.embeddings.weight 1000x64
N backbone.layers.#.norm.weight 64
S backbone.layers.#.mixer.A_log 128x16
S backbone.layers.#.mixer.D 128
S backbone.layers.#.mixer.conv1d.weight 128x1x4
L backbone.layers.#.mixer.in_proj.weight 256x64
L backbone.layers.#.mixer.x_proj.weight 36x128
L backbone.layers.#.mixer.dt_proj.weight 128x4 +b
L backbone.layers.#.mixer.out_proj.weight 64x128
N backbone.norm_f.weight 64
"""),
    ("rwkv", {"model_type": "rwkv", "vocab_size": 1000, "hidden_size": 64}, """
E rwkv.embeddings.weight 1000x64
N rwkv.blocks.0.pre_ln.weight 64 +b
S rwkv.blocks.#.attention.time_decay 64
S rwkv.blocks.#.attention.time_mix_key 1x1x64
L rwkv.blocks.#.attention.key.weight 64x64
L rwkv.blocks.#.attention.value.weight 64x64
L rwkv.blocks.#.feed_forward.key.weight 256x64
H head.weight 1000x64
"""),
)  # fmt: skip

ARCHITECTURES = {name: _expand(name, config, text) for name, config, text in _SOURCES}
