"""Roles, fused sets and gated MLPs over headers of real architectures."""

from __future__ import annotations

import dataclasses
import time

import pytest
from architectures import ARCHITECTURES

from compress.errors import InputError
from compress.roles import GatedMlp, assign_roles, fused_sets, gated_mlps, refuse_quantized
from compress.tensor import Role, TensorInfo


def info(name: str, *shape: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, "model.safetensors", dtype, shape, 0)


def role_of(name: str, *shape: int, others: tuple[TensorInfo, ...] = (), **config: object) -> Role:
    return assign_roles([info(name, *shape), *others], config or None)[0].role


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_the_architecture_gets_its_role(name: str) -> None:
    architecture = ARCHITECTURES[name]
    found = {i.name: i.role for i in assign_roles(architecture.infos, architecture.config)}
    wrong = {n: (r.value, architecture.roles[n].value) for n, r in found.items()
             if r is not architecture.roles[n]}  # fmt: skip
    assert wrong == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_a_config_nothing_else_becomes_a_target(name: str) -> None:
    """A lone file has no config: what is no weight must not be taken for one."""
    architecture = ARCHITECTURES[name]
    weights = {Role.LINEAR, Role.CONV, Role.CONV1D, Role.EXPERTS}
    taken = {i.name for i in assign_roles(architecture.infos, None) if i.role in weights}
    allowed = {n for n, role in architecture.roles.items() if role in weights}
    assert taken <= allowed
    assert len(taken) >= 0.9 * len(allowed)


def test_there_are_enough_architectures() -> None:
    assert len(ARCHITECTURES) >= 30


def test_only_the_role_changes_and_the_order_stays() -> None:
    before = [
        TensorInfo("b.fc.weight", "f", "BF16", (4, 2), 16, 99),
        TensorInfo("a.fc.weight", "g", "F32", (2, 2), 16, 8),
    ]
    after = assign_roles(before, None)
    assert [dataclasses.replace(i, role=Role.UNCLEAR) for i in after] == before
    assert [i.role for i in after] == [Role.LINEAR, Role.LINEAR]


def test_integers_are_never_weights() -> None:
    assert assign_roles([info("fc.weight", 4, 4, dtype="I32")], None)[0].role is Role.STATE


def test_gpt2_layout_follows_the_shapes_not_the_config() -> None:
    linear = (info("h.0.attn.c_attn.weight", 192, 64), info("h.0.attn.c_attn.bias", 192))
    assert role_of("h.0.attn.c_proj.weight", 64, 64, others=linear, model_type="gpt2") is (
        Role.LINEAR
    )
    transposed = (info("h.0.attn.c_attn.weight", 64, 192),)
    assert role_of("h.0.attn.c_proj.weight", 64, 64, others=transposed) is Role.CONV1D
    assert role_of("h.0.attn.c_proj.weight", 64, 64, model_type="gpt2") is Role.CONV1D
    assert role_of("h.0.attn.c_proj.weight", 64, 64) is Role.UNCLEAR


def test_gate_is_a_router_only_beside_experts() -> None:
    up = (info("l.0.mlp.up.weight", 8, 4),)
    assert role_of("l.0.mlp.gate.weight", 8, 4, others=up) is Role.LINEAR
    expert = (info("l.0.mlp.experts.0.w1.weight", 8, 4),)
    assert role_of("l.0.mlp.gate.weight", 8, 4, others=expert) is Role.ROUTER
    assert role_of("l.0.mlp.gate.weight", 8, 4) is Role.UNCLEAR
    assert role_of("l.0.mlp.gate_proj.weight", 8, 4, others=expert) is Role.LINEAR


def test_a_head_is_known_by_its_rows() -> None:
    assert role_of("head.weight", 500, 64, vocab_size=500, hidden_size=64) is Role.HEAD
    assert role_of("head.weight", 10, 64, vocab_size=500, hidden_size=64) is Role.LINEAR
    inside = role_of("layers.3.head.weight", 500, 64, vocab_size=500, hidden_size=64)
    assert inside is Role.LINEAR


def test_a_bias_that_does_not_fit_makes_it_unclear() -> None:
    assert role_of("fc.weight", 8, 4, others=(info("fc.bias", 4),)) is Role.UNCLEAR
    transposed = role_of("deconv.weight", 8, 4, 2, 2, others=(info("deconv.bias", 4),))
    assert transposed is Role.UNCLEAR
    assert role_of("strange.weight", 8, 4, others=(info("strange.bias", 8),)) is Role.LINEAR
    assert role_of("strange.weight", 8, 4) is Role.UNCLEAR


def test_separate_fused_experts_need_the_hidden_size() -> None:
    assert role_of("l.experts.up_proj", 4, 48, 64, hidden_size=64) is Role.EXPERTS
    assert role_of("l.experts.up_proj", 4, 64, 48, hidden_size=64) is Role.UNCLEAR
    assert role_of("l.experts.down_proj", 4, 64, 48, hidden_size=64) is Role.EXPERTS
    assert role_of("l.experts.up_proj", 4, 48, 64) is Role.UNCLEAR


@pytest.mark.parametrize(
    "name",
    ["_" * 100_000, "a." * 50_000, "ln_" * 40 + "!", "proj" * 20_000 + "!", "(a+)+$", "", "\0.w"],
)
def test_hostile_names_take_no_time(name: str) -> None:
    start = time.process_time()
    assign_roles([info(name, 4, 4), info(name + ".weight", 4, 4)], None)
    # Milliseconds; a pattern that backtracks without bound would take hours.
    assert time.process_time() - start < 5


def tensors(name: str) -> list[TensorInfo]:
    architecture = ARCHITECTURES[name]
    return assign_roles(architecture.infos, architecture.config)


def test_fused_sets_of_a_decoder() -> None:
    attention = "model.layers.0.self_attn."
    sets = fused_sets(tensors("llama"))
    assert len(sets) == 4
    assert tuple(f"{attention}{leaf}_proj.weight" for leaf in "qkv") in sets
    assert ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight") in sets
    q_and_kv = fused_sets(tensors("deepseek_v3"))
    assert (attention + "q_a_proj.weight", attention + "kv_a_proj_with_mqa.weight") in q_and_kv


def test_cross_attention_fuses_key_and_value_only() -> None:
    sets = fused_sets(tensors("whisper"))
    cross = [s for s in sets if "encoder_attn" in s[0]]
    assert cross and all([n.split(".")[-2] for n in s] == ["k_proj", "v_proj"] for s in cross)
    assert all(len(s) == 3 for s in sets if "self_attn" in s[0])
    assert fused_sets(tensors("rwkv")) == []


@pytest.mark.parametrize(
    ("name", "gate", "up", "down"),
    [
        ("llama", "gate_proj", "up_proj", "down_proj"),
        ("llama_original", "w1", "w3", "w2"),
        ("mixtral", "w1", "w3", "w2"),
        ("t5", "wi_0", "wi_1", "wo"),
    ],
)
def test_gated_mlps_by_their_names(name: str, gate: str, up: str, down: str) -> None:
    found = gated_mlps(tensors(name))
    assert [m.layer for m in found] in ([0, 1], [0, 0, 1, 1])
    for mlp in found:
        assert [n.split(".")[-2] for n in (mlp.gate, mlp.up, mlp.down)] == [gate, up, down]
        assert mlp.gate_rows is None and mlp.up_rows is None


def test_fused_gate_and_up_are_halves_of_one_tensor() -> None:
    first, second = gated_mlps(tensors("phi3"))
    fused, down = "model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert first == GatedMlp(0, fused, fused, down, slice(0, 160), slice(160, 320))
    assert second.layer == 1
    assert len(gated_mlps(tensors("modernbert"))) == 2
    assert gated_mlps(tensors("bert")) == []


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "scale", "input_scale"])
def test_scaled_fp8_is_refused(scale: str) -> None:
    codes = info("layers.0.q_proj.weight", 4, 4, dtype="F8_E4M3")
    refuse_quantized([codes])
    with pytest.raises(InputError, match="not weights"):
        refuse_quantized([codes, info(f"layers.0.q_proj.{scale}", 1)])


@pytest.mark.parametrize(
    "leaf",
    ["qweight", "qzeros", "g_idx", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "SCB"],
)
def test_leftovers_of_other_quantizers_are_refused(leaf: str) -> None:
    with pytest.raises(InputError, match="already quantized"):
        refuse_quantized([info(f"layers.0.q_proj.{leaf}", 4, 4, dtype="I32")])
