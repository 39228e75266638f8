"""What each tensor is to the network, from its name, its shape and the config: headers only.

A table of names gives a guess, the shapes of the tensor and of its neighbours confirm it. A guess
that the shapes contradict becomes UNCLEAR: such a tensor is left alone and listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from compress.errors import InputError, show
from compress.related import GatedMlp, fused_sets, gated_mlps
from compress.tensor import Role, TensorInfo

__all__ = [
    "GatedMlp",
    "assign_roles",
    "fused_sets",
    "gated_mlps",
    "refuse_quantized",
    "refuse_scaled_fp8",
]

# Tried in order on the last three parts of the lower-case name without `.weight`, numbers written
# as 0; the first match is the guess. The table decides by name only: shapes are checked after.
# Names come from the file, so no pattern may take more than quadratic time in _MAX_PATTERN.
_P = r"(.*\.)?"  # any parent modules
_NAMES: tuple[tuple[Role, tuple[str, ...]], ...] = (
    # Buffers and state-space parameters: a mask called `attn.bias` is not a bias.
    (Role.STATE, (
        r"(attn|attention)\.(masked_)?bias",
        r"running_(mean|var)|num_batches_tracked|inv_freq|position_ids|rotary_emb\.\w+",
        r"a_log|d|dt_bias|logit_scale|logit_bias|sinks|time_[a-z_]+",
        r"(layer_?scale\w*|ls0|gamma_0)(\.(lambda0|gamma))?",
        r"(mixer|mamba|ssm|linear_attn)\.conv0d",
    )),
    # Position tables and learned tokens, before what merely ends in "embeddings" or "bias".
    (Role.POSITION, (
        r"relative_attention_bias|relative_position_bias(_table)?",
        r"wpe|embed_positions|rel_embeddings|pos_emb|pos_embed|pos_embedding",
        r"(\w+_)?(position|positional|token_type|segment|type)_(embedding|embeddings|embed|emb)",
        r"(cls|class|mask|dist|distillation|reg|register|query)_tokens?",
        r"class_embedding|masked_spec_embed|latents",
    )),
    # A bare `gate` needs more evidence, see _gate.
    (Role.ROUTER, (r"router(\.(layer|classifier|linear))?", r"shared_expert_gate")),
    (Role.NORM, (
        r"(\w+_)?(norm|ln|layernorm|rmsnorm|batchnorm|groupnorm|bn)(_?[a-z0]{1,5})?",
        r"\w*(layernorm|layer_norm|_norm|norm0|_ln|ln_)\w{0,10}",
        r"gamma|beta",
    )),
    (Role.BIAS, (r"(\w+_)?bias(_\w+)?",)),
    (Role.LINEAR, (r"embeddings_project|project_in|project_out", r"pwconv0?")),
    # Heads over the vocabulary, then token tables.
    (Role.HEAD, (
        r"lm_head|embed_out|vocab_projector|generator_lm_head|score|shared_head\.head",
        r"(cls|predictions|lm_head)\.decoder",
    )),
    (Role.EMBEDDING, (
        r"(\w+_)?(wte|shared|emb|embeds?|embeddings?|embed_tokens|embed_in)(_per_layer)?(\.0)?",
        r"embedding_table|tokens_embed|lut",
    )),
    # Fused experts: which axis is which is decided from shapes, see _experts.
    (Role.EXPERTS, (
        r"experts\.(gate_up_proj|gate_proj|up_proj|down_proj|w0)",
        r"(block_sparse_moe|moe)\.(input_linear|output_linear)",
    )),
    (Role.UNCLEAR, (r"lora_[ab](\..*)?",)),
    (Role.CONV, (r"\w*conv\w*",)),
    (Role.LINEAR, (
        r"\w*(proj|dense|linear|lin|query|key|value|qkv|attn|attention|classifier|transform)\w*",
        r"\w*(mapping|receptance|mlp|ffn|predictor|reduction)\w*",
        r"fc\w*|heads?|[qkvorg]|w0|w[qkviov]|wi_0|up|down|in|outputs?|out|to_\w+|logits",
        r"qa_outputs|seq_relationship|decoder|generator|lm_\w+",
        r"\w+\.0(\.0)*",  # members of a Sequential
    )),
)  # fmt: skip
_RULES = [
    (re.compile("|".join(f"{_P}(?:{pattern})" for pattern in patterns)), role)
    for role, patterns in _NAMES
]
_MAX_PATTERN = 120
_GATE = re.compile(r"(.*\.)?gate")
_CONV1D = re.compile(r"(.*\.)?(c_attn|c_proj|c_fc|q_attn)\.weight")
_DIGITS = re.compile(r"[0-9]+")
_MAX_KERNEL = 64  # the longest kernel of a 3-D weight that is taken for a convolution by shape

_LEFTOVERS = re.compile(
    r".*\.(qweight|qzeros|g_idx|absmax|quant_map|nested_absmax|quant_state\..+|SCB|weight_packed|"
    r"(gate_up|down)_proj_(blocks|scales))"
)
_FP8_TAGS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


def assign_roles(infos: Sequence[TensorInfo], config: Mapping[str, Any] | None) -> list[TensorInfo]:
    """The same tensors in the same order, with `role` set."""
    facts = _Facts(infos, config)
    done = []
    for info in infos:
        if info.is_float and info.shape:
            pattern = _pattern(info.name)
            role = _confirm(info, facts.guess(pattern), pattern, facts)
        else:
            role = Role.STATE
        done.append(info if info.role is role else _with_role(info, role))
    return done


def _with_role(info: TensorInfo, role: Role) -> TensorInfo:
    # dataclasses.replace takes four times as long, and headers may hold 100,000 tensors.
    return TensorInfo(info.name, info.file, info.dtype, info.shape, info.nbytes, info.offset, role)


class _Facts:
    """What neighbours and the config tell: shapes by name, vocabulary sizes, expert counts."""

    def __init__(self, infos: Sequence[TensorInfo], config: Mapping[str, Any] | None) -> None:
        self.shapes = {info.name: info.shape for info in infos}
        parts = list(_parts(config or {}))
        self.vocabularies = _integers(parts, "vocab_size")
        self.hidden = _integers(parts, "hidden_size", "d_model", "n_embd")
        self.experts = _integers(
            parts, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"
        )
        self.model_types = {str(part.get("model_type", "")) for part in parts}
        self.is_conv1d = self._stores_conv1d()
        self._guesses: dict[str, Role] = {}

    def guess(self, pattern: str) -> Role:
        """What the table of names says, remembered: layers repeat their names."""
        role = self._guesses.get(pattern)
        if role is None:
            role = self._guesses[pattern] = _guess(pattern)
        return role

    @cached_property
    def tables(self) -> set[tuple[int, ...]]:
        """Shapes of the token tables."""
        return {
            shape
            for name, shape in self.shapes.items()
            if len(shape) == 2 and self.guess(_pattern(name)) is Role.EMBEDDING
        }

    def bias_of(self, info: TensorInfo) -> int | None:
        """Length of the bias beside a `.weight`, None if there is none."""
        shape = self.shapes.get(f"{info.module}.bias") if info.name.endswith(".weight") else None
        return shape[0] if shape is not None and len(shape) == 1 else None

    def has_module(self, prefix: str, *names: str) -> bool:
        """Whether `prefix` has one of these sub-modules with a weight."""
        return any(f"{prefix}.{name}.weight" in self.shapes for name in names)

    def _stores_conv1d(self) -> bool | None:
        """Whether c_attn and c_fc are [in, out] as in GPT-2; None if nothing tells.

        Both widen their input, so the longer axis is the output, whatever the config claims.
        """
        for name, shape in self.shapes.items():
            if name.endswith(("c_attn.weight", "c_fc.weight")) and len(shape) == 2:
                bias = self.shapes.get(name.removesuffix("weight") + "bias")
                if bias is not None and len(bias) == 1 and shape[0] != shape[1]:
                    return bias[0] == shape[1]
                if shape[0] != shape[1]:
                    return shape[1] > shape[0]
        if self.model_types & {"gpt2", "openai-gpt", "imagegpt"}:
            return True
        return None


def _pattern(name: str) -> str:
    return _DIGITS.sub("0", name.lower().removesuffix(".weight"))


def _guess(pattern: str) -> Role:
    tail = ".".join(pattern.split(".")[-3:])
    if len(tail) > _MAX_PATTERN:
        return Role.UNCLEAR
    return next((role for rule, role in _RULES if rule.fullmatch(tail)), Role.UNCLEAR)


def _confirm(info: TensorInfo, guess: Role, pattern: str, facts: _Facts) -> Role:
    """The guess if the shape can be that, else what the shape allows."""
    rank = len(info.shape)
    if rank == 1:
        keep = guess in (Role.NORM, Role.BIAS, Role.STATE, Role.POSITION)
        if keep:
            return guess
        return Role.NORM if info.name.endswith(".weight") else Role.STATE
    if guess in (Role.STATE, Role.POSITION, Role.BIAS):
        return guess
    if guess is Role.EXPERTS:
        return _experts(info, facts) if rank == 3 else Role.UNCLEAR
    if guess is Role.NORM or not _is_weight(info):
        return Role.UNCLEAR
    if rank >= 3:
        return _convolution(info, guess, facts)
    if _CONV1D.fullmatch(info.name):
        return _gpt2(info, facts)
    if _GATE.fullmatch(pattern):
        return _gate(info, facts)
    return _matrix(info, guess, pattern, facts)


def _is_weight(info: TensorInfo) -> bool:
    return info.name.endswith((".weight", "in_proj_weight")) or info.name == "weight"


def _matrix(info: TensorInfo, guess: Role, pattern: str, facts: _Facts) -> Role:
    """A 2-D weight: a table, a head, a Linear, or unclear."""
    if guess in (Role.ROUTER, Role.HEAD):
        return guess
    rows, columns = info.shape
    bias = facts.bias_of(info)
    if guess is Role.EMBEDDING:
        return Role.EMBEDDING if bias is None else Role.LINEAR
    # A head goes by many names (`head`, `output`, `proj_out`): it has a row for every token,
    # a column for every hidden unit, and lies outside the numbered layers.
    if "0" not in pattern.split("."):
        over_tokens = rows in facts.vocabularies and columns in facts.hidden
        if over_tokens or info.shape in facts.tables:
            return Role.HEAD
    if bias is not None:  # only a Linear has one; another length: stored [in, out], or not one
        return Role.LINEAR if bias == rows else Role.UNCLEAR
    return Role.LINEAR if guess is Role.LINEAR else Role.UNCLEAR


def _convolution(info: TensorInfo, guess: Role, facts: _Facts) -> Role:
    bias = facts.bias_of(info)
    if guess in (Role.ROUTER, Role.HEAD) or len(info.shape) > 5:
        return Role.UNCLEAR
    if bias is not None and bias != info.shape[0]:
        return Role.UNCLEAR  # transposed convolutions are [in, out, ...]
    if len(info.shape) == 3 and guess is not Role.CONV and info.shape[2] > _MAX_KERNEL:
        return Role.UNCLEAR  # a stack of matrices as likely as a convolution
    return Role.CONV


def _gpt2(info: TensorInfo, facts: _Facts) -> Role:
    if facts.is_conv1d is None:
        return Role.UNCLEAR
    bias = facts.bias_of(info)
    if bias is not None and bias != info.shape[1 if facts.is_conv1d else 0]:
        return Role.UNCLEAR
    return Role.CONV1D if facts.is_conv1d else Role.LINEAR


def _gate(info: TensorInfo, facts: _Facts) -> Role:
    """`gate` is a router beside experts and a Linear beside `up` and `down`."""
    parent = info.module.removesuffix("gate").removesuffix(".")
    if facts.has_module(parent, "up", "down", "up_proj", "down_proj"):
        return Role.LINEAR
    if info.shape[0] in facts.experts or any(
        name.startswith(f"{parent}.experts.") for name in facts.shapes
    ):
        return Role.ROUTER
    return Role.UNCLEAR


def _experts(info: TensorInfo, facts: _Facts) -> Role:
    """EXPERTS if the stack is [experts, out, in]; some models store [experts, in, out]."""
    _, rows, columns = info.shape
    if info.name.endswith(("input_linear.weight", "output_linear.weight")):
        return Role.EXPERTS
    name = info.module
    prefix, _, leaf = name.rpartition(".")
    if leaf in ("gate_up_proj", "down_proj"):
        tail = info.name.removeprefix(name)
        gate_up = facts.shapes.get(f"{prefix}.gate_up_proj{tail}")
        down = facts.shapes.get(f"{prefix}.down_proj{tail}")
        if gate_up is not None and down is not None and len(gate_up) == len(down) == 3:
            stored = gate_up[1] == 2 * down[2] and gate_up[2] == down[1]
            return Role.EXPERTS if stored else Role.UNCLEAR
    hidden_is_out = leaf in ("down_proj", "w2")
    out, inner = (rows, columns) if hidden_is_out else (columns, rows)
    # `out` is the axis that must be the hidden size if the layout is [experts, out, in].
    return Role.EXPERTS if out in facts.hidden and inner not in facts.hidden else Role.UNCLEAR


def refuse_quantized(infos: Sequence[TensorInfo]) -> None:
    """Raises InputError for weights that are codes already: FP8 with scales, GPTQ, AWQ, NF4."""
    refuse_scaled_fp8(infos)
    for info in infos:
        if _LEFTOVERS.fullmatch(info.name):
            raise InputError(
                f"tensor '{show(info.name)}': the checkpoint is already quantized",
                hint="start from the original, unquantized checkpoint",
            )


def refuse_scaled_fp8(infos: Sequence[TensorInfo]) -> None:
    """Raises InputError for FP8 tensors with scales beside them: raw codes are not weights."""
    codes = next((info for info in infos if info.dtype in _FP8_TAGS), None)
    if codes is None:
        return
    scale = next((info for info in infos if _is_scale(info.name)), None)
    if scale is not None:
        raise InputError(
            f"tensor '{show(codes.name)}': {codes.dtype} codes scaled by '{show(scale.name)}',"
            " not weights",
            hint="start from the 16-bit checkpoint",
        )


def _is_scale(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf in ("scale", "scale_inv", "scale_weight") or leaf.endswith(("_scale", "_scale_inv"))


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and the configs of its towers (text_config, vision_config, ...)."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping) and any(k in value for k in ("hidden_size", "model_type")):
            yield value


def _integers(parts: Sequence[Mapping[str, Any]], *keys: str) -> set[int]:
    return {part[key] for part in parts for key in keys if type(part.get(key)) is int}
