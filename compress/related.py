"""Tensors that belong together: sets that engines fuse into one matrix, and MLPs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from compress.tensor import Role, TensorInfo

# Siblings that engines join into one matrix product, in the order of their rows there.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("gate", "up"),
)
# In cross-attention the query reads another input than key and value.
_CROSS = re.compile(r"(encoder_attn|encdecattention|cross_?att)", re.IGNORECASE)

# (gate, up, down) by sibling names; None: gate and up are the halves of the first.
_GATED: tuple[tuple[str, str | None, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("wi_0", "wi_1", "wo"),
    ("gate", "up", "down"),
    ("gate_up_proj", None, "down_proj"),
    ("gate_and_up", None, "down"),
    ("Wi", None, "Wo"),
)
# (first, second) of an MLP without a gate, by names relative to their common parent.
_PLAIN = (
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("intermediate.dense", "output.dense"),
    ("up_proj", "down_proj"),
    ("wi", "wo"),
    ("fc_in", "fc_out"),
    ("lin1", "lin2"),
    ("linear1", "linear2"),
    ("ffn", "ffn_output"),
)
_NUMBER = re.compile(r"(?:^|\.)([0-9]+)(?:\.|$)")


@dataclass(frozen=True)
class GatedMlp:
    """down( act(gate(x)) * up(x) ): names of the three weights.

    layer      the first number in the name, -1 without one
    gate_rows, up_rows  where gate and up lie in one fused tensor; None where each has its own
    """

    layer: int
    gate: str
    up: str
    down: str
    gate_rows: slice | None = None
    up_rows: slice | None = None


def fused_sets(infos: Sequence[TensorInfo]) -> list[tuple[str, ...]]:
    """Names of the LINEAR tensors that engines fuse, one tuple a set."""
    sets = []
    for prefix, children in _linear_children(infos).items():
        for leaves in _FUSED:
            wanted = leaves
            if len(leaves) == 3 and _CROSS.search(prefix):
                wanted = leaves[1:]
            # A part of a set is no set: RWKV's key and value read different inputs.
            members = [children[leaf] for leaf in wanted if leaf in children]
            if len(members) == len(wanted) and len({info.shape[1] for info in members}) == 1:
                sets.append(tuple(info.name for info in members))
    return sets


def gated_mlps(infos: Sequence[TensorInfo]) -> list[GatedMlp]:
    """Every gated MLP made of LINEAR tensors, in the order of the checkpoint."""
    found = []
    for prefix, children in _linear_children(infos).items():
        for gate_leaf, up_leaf, down_leaf in _GATED:
            gate, down = children.get(gate_leaf), children.get(down_leaf)
            if gate is None or down is None:
                continue
            number = _NUMBER.search(prefix)
            layer = int(number[1]) if number else -1
            width = down.shape[1]
            if up_leaf is None:
                if gate.shape[0] == 2 * width:
                    halves = slice(0, width), slice(width, 2 * width)
                    found.append(GatedMlp(layer, gate.name, gate.name, down.name, *halves))
                continue
            up = children.get(up_leaf)
            if up is not None and up.shape == gate.shape and gate.shape[0] == width:
                found.append(GatedMlp(layer, gate.name, up.name, down.name))
    return found


def down_projections(infos: Sequence[TensorInfo]) -> dict[str, int]:
    """Second matrices of the MLPs, gated or not, with their layers, in the checkpoint's order.

    The layer is the first number in the name, -1 without one.
    """
    shapes = {
        info.module: info.matrix_shape
        for info in infos
        if info.role in (Role.LINEAR, Role.CONV1D) and len(info.shape) == 2
    }
    found = {mlp.down: mlp.layer for mlp in gated_mlps(infos)}
    for info in infos:
        for first, second in _PLAIN:
            parent = info.module.removesuffix(second)
            if info.module not in shapes or parent == info.module or parent[-1:] not in ("", "."):
                continue
            if shapes.get(parent + first) == shapes[info.module][::-1]:
                number = _NUMBER.search(info.module)
                found[info.name] = int(number[1]) if number else -1
    return {info.name: found[info.name] for info in infos if info.name in found}


def _linear_children(infos: Sequence[TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Parent module -> last part of the name -> tensor, for LINEAR weights."""
    children: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for info in infos:
        if info.role is Role.LINEAR and len(info.shape) == 2:
            prefix, _, leaf = info.module.rpartition(".")
            children[prefix][leaf] = info
    return children
