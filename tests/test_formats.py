"""Formats: what is packed comes back, `layout` says what `pack` makes, records are strict."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from compress import formats, kernels
from compress.errors import CompressError, InputError, UsageError
from compress.formats import metadata, peft
from compress.formats.arrays import plain
from compress.formats.base import ADAPTER, MODEL, SUPER_WEIGHTS, Entry, Format, Named
from compress.formats.compressed_tensors import targets
from compress.formats.native import Storage, storage
from compress.layout import PART_FILES
from compress.output import is_compressed, open_any, open_output
from compress.passes.base import CodesSpec, Terms
from compress.tensor import (
    DTYPES,
    Array,
    Codes,
    Factors,
    Outliers,
    Role,
    Tensor,
    TensorInfo,
)

NATIVE, ONNX = formats.get("native"), formats.get("onnx")
ENGINE = formats.get("compressed-tensors")
DENSE = formats.get("dense")


def make_info(
    shape: tuple[int, ...],
    dtype: str = "F32",
    role: Role = Role.LINEAR,
    name: str = "model.layers.0.mlp.up_proj.weight",
) -> TensorInfo:
    nbytes = int(np.prod(shape)) * DTYPES[dtype].itemsize
    return TensorInfo(name, "model.safetensors", dtype, shape, nbytes, role=role)


def make_source(info: TensorInfo, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).normal(0, 0.05, info.matrix_shape)
    return values.astype(DTYPES[info.dtype])


def quantize(
    info: TensorInfo, spec: CodesSpec, mask: Array | None = None, seed: int = 0
) -> tuple[Array, Codes]:
    """(source, codes) by the reference quantizer; a scale per tensor is made from the first."""
    source = make_source(info, seed)
    rows, columns = source.shape
    group = max(columns, 1) if spec.per_tensor else spec.group_size
    groups = -(-columns // group)
    values = np.empty((rows, columns), np.uint8)
    scale = np.empty((rows, groups), DTYPES[spec.scale_dtype])
    zero_point = None if spec.symmetric else np.empty((rows, groups), np.uint8)
    weights = source.astype(np.float32) if info.dtype not in ("F32", "F16", "BF16") else source
    bad = kernels.quantize_groups(
        weights,
        mask,
        bits=spec.bits,
        group_size=group,
        symmetric=spec.symmetric,
        scale_dtype=spec.scale_dtype,
        search="none",
        signed_scale=False,
        codes=values,
        scale=scale,
        zero_point=zero_point,
        sums=np.zeros((rows, 3)),
    )
    assert bad == -1
    if spec.per_tensor:
        scale, zero_point = scale[:1], None if zero_point is None else zero_point[:1]
    return source, Codes(values, scale, zero_point, spec.bits, group)


def pack_and_unpack(
    fmt: Format, tensor: Tensor, terms: Terms, *, tile_rows: int | None = None
) -> tuple[Tensor, Named]:
    """Pack (in tiles, joined as the writer does), compare with `layout`, unpack."""
    tiles = [tensor] if tile_rows is None else cut(tensor, tile_rows)
    packed = [fmt.pack(tile, terms) for tile in tiles]
    joined: Named = {}
    for key in packed[0]:
        joined[key] = np.concatenate([p[key].reshape(-1) for p in packed if key in p])
    specs = fmt.layout(tensor.info, terms)
    assert sorted(joined) == sorted((s.part, s.name) for s in specs)
    for spec in specs:
        array = joined[spec.part, spec.name]
        assert spec.at_most is None
        assert array.dtype == DTYPES[spec.dtype], spec
        joined[spec.part, spec.name] = array.reshape(spec.shape)
        if tile_rows is None:
            assert packed[0][spec.part, spec.name].shape == spec.shape
    entry = Entry(dataclasses.replace(tensor.info, file=""), terms)
    read_only = {key: value.copy() for key, value in joined.items()}
    for value in read_only.values():
        value.flags.writeable = False
    return fmt.unpack(entry, lambda part, name: read_only[part, name]), joined


def fetch_from(named: Named) -> Callable[[str, str], Array]:
    return lambda part, name: named[part, name]


def cut(tensor: Tensor, rows: int) -> list[Tensor]:
    tiles = []
    for start in range(0, tensor.source.shape[0], rows):
        part = slice(start, start + rows)
        codes = tensor.codes
        if codes is not None:
            per_row = codes.scale.shape[0] == codes.values.shape[0]
            codes = dataclasses.replace(
                codes,
                values=codes.values[part],
                scale=codes.scale[part] if per_row else codes.scale,
                zero_point=codes.zero_point[part]
                if per_row and codes.zero_point is not None
                else codes.zero_point,
            )
        mask = None if tensor.mask is None else tensor.mask[part]
        tiles.append(
            dataclasses.replace(
                tensor, source=tensor.source[part], first_row=start, mask=mask, codes=codes
            )
        )
    return tiles


def exact(count: int) -> tuple[int, int]:
    return count, count


# -- native ----------------------------------------------------------------------------------


@st.composite
def native_cases(draw: st.DrawFn) -> tuple[Tensor, Terms]:
    """A tensor of any role with any terms."""
    role, shape = draw(
        st.sampled_from(
            [
                (Role.LINEAR, (5, 13)),
                (Role.LINEAR, (1, 1)),
                (Role.LINEAR, (8, 64)),
                (Role.CONV, (4, 3, 3, 3)),
                (Role.CONV1D, (6, 10)),
                (Role.EXPERTS, (3, 4, 10)),
                (Role.EMBEDDING, (11, 8)),
                (Role.UNCLEAR, (7,)),
            ]
        )
    )
    dtype = draw(st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3"]))
    info = make_info(shape, dtype, role)
    rows, columns = info.matrix_shape
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    terms, mask = Terms(), None
    if draw(st.booleans()):
        mask = rng.random((rows, columns)) < draw(st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))
        terms = dataclasses.replace(terms, nonzeros=exact(int(mask.sum())))
    tensor = Tensor(info, make_source(info, seed), mask=mask)
    if draw(st.booleans()):
        spec = CodesSpec(
            bits=draw(st.integers(2, 8)),
            group_size=draw(st.integers(1, columns)),
            symmetric=draw(st.booleans()),
            scale_dtype=draw(st.sampled_from(["F16", "BF16", "F32"])),
        )
        source, codes = quantize(info, spec, mask, seed)
        tensor = tensor.with_(source=source, codes=codes)
        terms = dataclasses.replace(terms, codes=spec)
    if draw(st.booleans()):
        factors, factor_dtype = draw_factors(draw(st.sampled_from(["F16", "F32", "I8"])), info, rng)
        tensor = tensor.with_(factors=factors)
        terms = dataclasses.replace(terms, rank=factors.rank, factor_dtype=factor_dtype)
    if draw(st.booleans()):
        flat = np.sort(rng.choice(rows * columns, min(3, rows * columns), replace=False))
        at, across = np.divmod(flat, columns)
        tensor = tensor.with_(outliers=Outliers(at, across, tensor.source[at, across]))
        counts = exact(flat.size), exact(np.unique(across).size)
        terms = dataclasses.replace(terms, outliers=counts[0], outlier_columns=counts[1])
    return tensor, terms


def draw_factors(tag: str, info: TensorInfo, rng: np.random.Generator) -> tuple[Factors, str]:
    rows, columns = info.matrix_shape
    stack: tuple[int, ...] = ()
    if info.role is Role.EXPERTS:
        stack, rows = (info.shape[0],), info.shape[1]
    if tag == "I8":
        b = rng.integers(-127, 128, (*stack, rows, 2)).astype(np.int8)
        a = rng.integers(-127, 128, (*stack, 2, columns)).astype(np.int8)
        scales = rng.random((2, *stack, 2)).astype(np.float32)
        return Factors(b, a, scales[0], scales[1]), tag
    b = rng.normal(size=(*stack, rows, 2)).astype(DTYPES[tag])
    return Factors(b, rng.normal(size=(*stack, 2, columns)).astype(DTYPES[tag])), tag


@settings(max_examples=150, deadline=None)
@given(native_cases(), st.sampled_from([NATIVE, ONNX]))
def test_every_combination_of_terms_is_held(case: tuple[Tensor, Terms], fmt: Format) -> None:
    tensor, terms = case
    back, _ = pack_and_unpack(fmt, tensor, terms)
    assert back.decode().tobytes() == tensor.decode().tobytes()
    assert plain(back).tobytes() == plain(tensor).tobytes()
    if tensor.codes is not None and back.codes is not None:
        assert np.array_equal(back.codes.values, tensor.codes.values)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    columns=st.integers(1, 40),
    symmetric=st.booleans(),
    per_tensor=st.booleans(),
    tile_rows=st.integers(1, 9),
    fmt=st.sampled_from([NATIVE, ONNX]),
)
def test_tiles_join_to_the_whole(
    bits: int, columns: int, symmetric: bool, per_tensor: bool, tile_rows: int, fmt: Format
) -> None:
    info = make_info((9, columns))
    spec = CodesSpec(bits, min(16, columns), symmetric, "F16", per_tensor)
    source, codes = quantize(info, spec)
    tensor, terms = Tensor(info, source, codes=codes), Terms(codes=spec)
    _, whole = pack_and_unpack(fmt, tensor, terms)
    _, tiled = pack_and_unpack(fmt, tensor, terms, tile_rows=tile_rows)
    for key, array in whole.items():
        assert np.array_equal(array, tiled[key]), key


def test_native_pruned_values_in_tiles() -> None:
    info = make_info((9, 33), "BF16")
    mask = np.random.default_rng(0).random((9, 33)) < 0.3
    tensor = Tensor(info, make_source(info), mask=mask)
    terms = Terms(nonzeros=exact(int(mask.sum())))
    back, named = pack_and_unpack(NATIVE, tensor, terms, tile_rows=4)
    assert np.array_equal(back.decode(), tensor.decode())
    assert named[MODEL, f"{info.name}.values"].shape == (mask.sum(),)
    assert np.array_equal(
        named[MODEL, f"{info.name}.mask"], np.packbits(mask, axis=1, bitorder="little")
    )


def test_native_codes_are_a_little_endian_bit_stream() -> None:
    info = make_info((1, 4))
    codes = Codes(np.array([[1, 2, 3, 7]], np.uint8), np.ones((1, 1), np.float16), None, 3, 4)
    named = NATIVE.pack(
        Tensor(info, make_source(info), codes=codes), Terms(codes=CodesSpec(3, 4, True, "F16"))
    )
    word = 1 | 2 << 3 | 3 << 6 | 7 << 9
    assert bytes(named[MODEL, f"{info.name}.codes"][0]) == word.to_bytes(2, "little")


def test_native_stores_a_mask_only_where_it_saves_bytes() -> None:
    info = make_info((64, 64))
    codes = CodesSpec(4, 64, True, "F16")
    assert storage(info, Terms(nonzeros=exact(64 * 48), codes=codes)) is Storage.DENSE  # 1 + 3
    assert storage(info, Terms(nonzeros=exact(64 * 48 - 8), codes=codes)) is Storage.SPARSE
    assert storage(info, Terms(nonzeros=exact(64 * 61))) is Storage.SPARSE  # 1 + 30.5 of 32
    assert storage(info, Terms(nonzeros=exact(64 * 64))) is Storage.DENSE


def test_an_open_count_gives_bounds_that_hold_both_ends() -> None:
    info = make_info((64, 64))
    for codes in (None, CodesSpec(4, 64, True, "F16")):
        for low, high in ((0, 64 * 64), (100, 200), (64 * 40, 64 * 60)):
            terms = Terms(nonzeros=(low, high), codes=codes)
            least, most = bounds(NATIVE, info, terms)
            for end in range(2):
                size = bounds(NATIVE, info, terms.at(end))
                assert size[0] == size[1]
                assert least <= size[0] <= most


def bounds(fmt: Format, info: TensorInfo, terms: Terms) -> tuple[int, int]:
    least = most = 0
    for spec in fmt.layout(info, terms):
        row = int(np.prod(spec.shape[1:])) * DTYPES[spec.dtype].itemsize
        least += spec.shape[0] * row
        most += (spec.shape[0] if spec.at_most is None else spec.at_most) * row
    return least, most


def test_packing_before_the_count_is_known_is_refused() -> None:
    info = make_info((64, 64))
    codes = CodesSpec(4, 64, True, "F16")
    terms = Terms(nonzeros=(64 * 40, 64 * 60), codes=codes)
    source, made = quantize(info, codes)
    with pytest.raises(ValueError, match="counted"):
        NATIVE.pack(Tensor(info, source, codes=made), terms)
    with pytest.raises(ValueError, match="counted"):
        metadata.encode("native", [Entry(info, terms)])


def test_native_refuses_names_that_are_taken() -> None:
    info = make_info((8, 8))
    other = make_info((8, 1), name=f"{info.name}.scale", role=Role.UNCLEAR)
    changed = {info.name: Terms(codes=CodesSpec(4, 8, True, "F16"))}
    reason = NATIVE.refuses_model(changed, [info, other], None)
    assert reason is not None and "taken" in reason
    assert NATIVE.refuses_model(changed, [info], None) is None


# -- dense -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", "F8_E4M3"])
@pytest.mark.parametrize(
    ("role", "shape"),
    [
        (Role.LINEAR, (12, 10)),
        (Role.CONV, (12, 2, 3, 3)),
        (Role.CONV1D, (6, 10)),
        (Role.EXPERTS, (3, 4, 10)),
    ],
)
def test_dense_is_the_decoded_tensor(dtype: str, role: Role, shape: tuple[int, ...]) -> None:
    info = make_info(shape, dtype, role)
    spec = CodesSpec(4, 5, False, "F16")
    source, codes = quantize(info, spec)
    tensor = Tensor(info, source, codes=codes)
    back, named = pack_and_unpack(DENSE, tensor, Terms(codes=spec))
    expected = tensor.decode().astype(DTYPES[dtype])
    assert named[MODEL, info.name].tobytes() == info.from_matrix(expected).tobytes()
    assert np.array_equal(back.source, expected)
    if role is not Role.CONV1D:
        _, tiled = pack_and_unpack(DENSE, tensor, Terms(codes=spec), tile_rows=5)
        assert tiled[MODEL, info.name].tobytes() == named[MODEL, info.name].tobytes()


def test_dense_does_not_round_a_pruned_float64() -> None:
    info = make_info((4, 4), "F64")
    tensor = Tensor(info, make_source(info), mask=np.eye(4, dtype=np.bool_))
    back, _ = pack_and_unpack(DENSE, tensor, Terms(nonzeros=exact(4)))
    assert np.array_equal(back.source, np.where(np.eye(4), tensor.source, 0))


@pytest.mark.parametrize("rank", [0, 2])
def test_exact_entries_of_float64_are_exact(rank: int) -> None:
    info = make_info((8, 16), "F64")
    spec = CodesSpec(4, 8, True, "F16")
    rows, columns = np.array([1, 6]), np.array([3, 15])
    source = make_source(info)
    tensor = Tensor(
        info,
        source,
        codes=quantize(info, spec)[1],
        outliers=Outliers(rows, columns, source[rows, columns]),
    )
    terms = Terms(codes=spec, rank=rank, outliers=exact(2), outlier_columns=exact(2))
    if rank:
        factors, tag = draw_factors("F16", info, np.random.default_rng(0))
        tensor, terms = tensor.with_(factors=factors), dataclasses.replace(terms, factor_dtype=tag)
    for fmt in (NATIVE, DENSE):
        back, _ = pack_and_unpack(fmt, tensor, terms)
        assert plain(back)[rows, columns].tobytes() == source[rows, columns].tobytes()


def test_dense_keeps_finite_values_finite() -> None:
    info = make_info((1, 2), "F16")
    codes = Codes(np.array([[255, 0]], np.uint8), np.array([[600]], np.float32), None, 8, 2)
    tensor = Tensor(info, np.zeros((1, 2), np.float16), codes=codes)
    assert float(np.abs(tensor.decode()).max()) > 65504
    named = DENSE.pack(tensor, Terms(codes=CodesSpec(8, 2, True, "F32")))
    assert named[MODEL, info.name].tolist() == [[65504, -65504]]


# -- compressed-tensors ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 15, 16, 43, 64])
@pytest.mark.parametrize("tile_rows", [None, 1, 4])
def test_engine_linear(bits: int, columns: int, tile_rows: int | None) -> None:
    info = make_info((6, columns))
    spec = CodesSpec(bits, columns if columns % 8 else 8, True, "F16")
    source, codes = quantize(info, spec)
    tensor, terms = Tensor(info, source, codes=codes), Terms(codes=spec)
    assert ENGINE.refuses(info, terms) is None
    back, named = pack_and_unpack(ENGINE, tensor, terms, tile_rows=tile_rows)
    assert np.array_equal(back.decode(), tensor.decode())
    packed = named[MODEL, f"{info.module}.weight_packed"]
    assert packed.dtype == np.int32
    row = int.from_bytes(packed[0].tobytes(), "little")
    unpacked = [row >> (i * bits) & ((1 << bits) - 1) for i in range(columns)]
    assert unpacked == codes.values[0].tolist()
    assert row >> (columns * bits) == 0
    assert named[MODEL, f"{info.module}.weight_shape"].tolist() == [6, columns]


def test_engine_embedding_is_int8() -> None:
    info = make_info((6, 16), "BF16", Role.EMBEDDING, "model.embed_tokens.weight")
    spec = CodesSpec(8, 16, True, "F16")
    source, codes = quantize(info, spec)
    tensor = Tensor(info, source, codes=codes)
    back, named = pack_and_unpack(ENGINE, tensor, Terms(codes=spec), tile_rows=4)
    assert np.array_equal(back.decode(), tensor.decode())
    stored = named[MODEL, info.name]
    assert np.array_equal(stored, codes.values.astype(np.int16) - 128)


def test_engine_writes_one_scale_a_tensor_once_a_row() -> None:
    info = make_info((6, 16))
    spec = CodesSpec(8, 16, True, "F16", per_tensor=True)
    source, codes = quantize(info, spec)
    tensor = Tensor(info, source, codes=codes)
    back, named = pack_and_unpack(ENGINE, tensor, Terms(codes=spec), tile_rows=4)
    assert named[MODEL, f"{info.module}.weight_scale"].shape == (6, 1)
    assert np.array_equal(back.decode(), tensor.decode())


REFUSED: list[tuple[dict[str, Any], Terms, str]] = [
    ({"role": Role.CONV, "shape": (8, 4, 3, 3)}, Terms(codes=CodesSpec(4, 4, True, "F16")), "conv"),
    ({"role": Role.CONV1D}, Terms(codes=CodesSpec(4, 4, True, "F16")), "conv1d"),
    ({"role": Role.EXPERTS, "shape": (2, 4, 8)}, Terms(codes=CodesSpec(4, 4, True, "F16")), "exp"),
    ({"role": Role.ROUTER}, Terms(codes=CodesSpec(4, 4, True, "F16")), "router"),
    ({"role": Role.EMBEDDING}, Terms(codes=CodesSpec(4, 4, True, "F16")), "embedding"),
    ({"name": "model.experts.down"}, Terms(codes=CodesSpec(4, 4, True, "F16")), ".weight"),
    ({"dtype": "F64"}, Terms(codes=CodesSpec(4, 4, True, "F16")), "F64"),
    ({"dtype": "F8_E4M3"}, Terms(codes=CodesSpec(4, 4, True, "F16")), "F8_E4M3"),
    ({}, Terms(codes=CodesSpec(4, 4, False, "F16")), "zero points"),
    ({}, Terms(codes=CodesSpec(3, 4, True, "F16")), "3-bit"),
    ({}, Terms(codes=CodesSpec(4, 5, True, "F16")), "divide"),
    ({}, Terms(codes=CodesSpec(4, 4, True, "F16"), rank=2, factor_dtype="I8"), "I8"),
    ({"role": Role.EMBEDDING}, Terms(codes=CodesSpec(8, 8, True, "F16"), rank=2), "low-rank"),
    ({"name": "model.experts.down"}, Terms(nonzeros=(9, 9), rank=2), ".weight"),
]


@pytest.mark.parametrize(("fields", "terms", "word"), REFUSED)
def test_engine_refuses(fields: dict[str, Any], terms: Terms, word: str) -> None:
    reason = ENGINE.refuses(make_info(**({"shape": (8, 8)} | fields)), terms)
    assert reason is not None and word in reason
    assert NATIVE.refuses(make_info(**({"shape": (8, 8)} | fields)), terms) is None


def llama_infos(layers: int = 2) -> list[TensorInfo]:
    infos = [make_info((32, 16), role=Role.EMBEDDING, name="model.embed_tokens.weight")]
    for layer in range(layers):
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"):
            infos.append(make_info((16, 16), name=f"model.layers.{layer}.{module}.weight"))
    infos.append(make_info((16,), role=Role.NORM, name="model.norm.weight"))
    return infos


def test_engine_wants_a_config() -> None:
    infos = llama_infos()
    changed = {infos[1].name: Terms(codes=CodesSpec(4, 16, True, "F16"))}
    reason = ENGINE.refuses_model(changed, infos, None)
    assert reason is not None and "config.json" in reason


def test_engine_wants_one_scheme_in_a_fused_set() -> None:
    infos = llama_infos(1)
    four, eight = (Terms(codes=CodesSpec(b, 16, True, "F16")) for b in (4, 8))
    names = [i.name for i in infos if "self_attn" in i.name]
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    assert ENGINE.refuses_model(dict.fromkeys(names, four), infos, config) is None
    for last in (eight, None):
        changed = dict.fromkeys(names[:2], four) | ({names[2]: last} if last else {})
        reason = ENGINE.refuses_model(changed, infos, config)
        assert reason is not None and "one width" in reason


@pytest.mark.parametrize(
    ("config", "head", "held"),
    [
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}, False, False),
        ({"architectures": ["LlamaForCausalLM"]}, False, False),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, True, True),
        ({"architectures": ["LlamaForCausalLM"]}, True, False),
        ({"architectures": ["BertModel"]}, False, True),
        ({"architectures": ["BertModel"], "tie_word_embeddings": True}, False, True),
        ({"architectures": ["GPT2LMHeadModel"]}, False, False),
        ({}, False, False),
        (
            {"architectures": ["T5Model"], "is_encoder_decoder": True,
             "tie_word_embeddings": False},
            False, False,
        ),
        ({"architectures": ["X"], "text_config": {"tie_word_embeddings": False}}, True, True),
    ],
)  # fmt: skip
def test_engine_refuses_codes_of_a_tied_embedding(
    config: dict[str, Any], head: bool, held: bool
) -> None:
    infos = llama_infos(1)
    if head:
        infos.append(make_info((32, 16), role=Role.HEAD, name="lm_head.weight"))
    changed = {"model.embed_tokens.weight": Terms(codes=CodesSpec(8, 16, True, "F16"))}
    reason = ENGINE.refuses_model(changed, infos, config)
    assert (reason is None) == held, reason


@pytest.mark.parametrize("terms", [Terms(codes=CodesSpec(4, 16, True, "F16")), Terms(rank=2)])
def test_engine_refuses_to_lose_the_other_name_of_a_tied_weight(terms: Terms) -> None:
    infos = llama_infos(1)
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    changed = {i.name: terms for i in infos if i.role is Role.LINEAR}
    last = infos[4].name
    aliases = {"model.layers.9.mlp.up_proj.weight": last}
    assert formats.refusal(ENGINE, changed, infos, config) is None
    reason = formats.refusal(ENGINE, changed, infos, config, aliases=aliases)
    assert reason is not None and last in reason and "layers.9" in reason
    for fmt in (NATIVE, DENSE):
        assert formats.refusal(fmt, changed, infos, config, aliases=aliases) is None
    pruned = changed | {last: Terms(nonzeros=(9, 9))}  # stored under its own name
    assert formats.refusal(ENGINE, pruned, infos, config, aliases=aliases) is None
    if terms.codes is not None:
        assert formats.choose(changed, infos, config, aliases=aliases)[0] is NATIVE


def test_auto_says_why() -> None:
    infos = llama_infos(1)
    four = Terms(codes=CodesSpec(4, 16, True, "F16"))
    names = [i.name for i in infos if i.role is Role.LINEAR]
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    assert formats.choose(dict.fromkeys(names, four), infos, config)[0] is ENGINE
    assert formats.choose({names[0]: Terms(nonzeros=(1, 1))}, infos, config)[0] is DENSE
    five = Terms(codes=CodesSpec(5, 16, True, "F16"))
    fmt, reason = formats.choose(dict.fromkeys(names, four) | {names[2]: five}, infos, config)
    assert fmt is NATIVE and names[2] in reason and "5-bit" in reason
    with pytest.raises(UsageError, match="no format"):
        formats.get("gguf")


# -- config.json and the adapter -------------------------------------------------------------


def test_targets_match_members_and_nothing_else() -> None:
    modules = {f"model.layers.{i}.mlp.{m}" for i in range(12) for m in ("up", "down")}
    modules |= {"lm_head", "model.embed_tokens"}
    members = {m for m in modules if m.endswith("up")} | {"model.layers.1.mlp.down"}
    patterns = targets(members, modules, {"model"})
    assert len(patterns) == 2
    for prefix in ("", "base.", "model."):
        for module in modules:
            name = prefix + module.removeprefix("model.")
            found = any(re.match(p.removeprefix("re:"), name) for p in patterns)
            assert found == (module in members), (patterns, name)


def test_targets_tell_two_towers_apart() -> None:
    modules = {"encoder.layers.0.fc", "vision.encoder.layers.0.fc", "encoder.layers.1.fc"}
    patterns = targets({"encoder.layers.0.fc", "encoder.layers.1.fc"}, modules, {"model"})
    matched = {m for m in modules if any(re.match(p.removeprefix("re:"), m) for p in patterns)}
    assert matched == {"encoder.layers.0.fc", "encoder.layers.1.fc"}


def test_config_keeps_its_order_and_loses_what_names_code() -> None:
    infos = llama_infos(2)
    config: dict[str, Any] = {"z": 1, "auto_map": {"AutoModel": "x.Y"}, "architectures": ["L"]}
    entries = [
        Entry(i, Terms(codes=CodesSpec(4, 16, True, "F16")))
        for i in infos
        if i.role is Role.LINEAR and "layers.0" in i.name
    ]
    files = ENGINE.extra_files(entries, config, infos)
    assert list(files) == ["config.json"]
    written = json.loads(files["config.json"])
    assert list(written) == ["z", "architectures", "quantization_config"]
    quantization = written["quantization_config"]
    assert quantization["format"] == "pack-quantized"
    assert "lm_head" in quantization["ignore"]
    ignored = [t.removeprefix("re:") for t in quantization["ignore"]]
    for info in infos:
        if info.role is Role.LINEAR:
            listed = any(re.match(p, info.module) for p in ignored)
            assert listed == ("layers.1" in info.name)


def with_super_weights(info: TensorInfo, spec: CodesSpec | None, rank: int) -> tuple[Tensor, Terms]:
    source = make_source(info)
    rows, columns = np.array([0, 2, 2]), np.array([3, 1, 3])
    source[rows, columns] = 5
    terms = Terms(codes=spec, rank=rank, outliers=exact(3), outlier_columns=exact(2))
    tensor = Tensor(info, source, outliers=Outliers(rows, columns, source[rows, columns], True))
    if spec is not None:
        tensor = tensor.with_(codes=quantize(info, spec)[1])
    if rank:
        rng = np.random.default_rng(1)
        a = rng.normal(size=(rank, info.shape[1])).astype(np.float16)
        b = rng.normal(size=(info.shape[0], rank)).astype(np.float16)
        tensor = tensor.with_(factors=Factors(b, a))
    return tensor, terms


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("spec", [CodesSpec(4, 8, True, "F16"), None])
def test_adapter_restores_super_weights(spec: CodesSpec | None, rank: int) -> None:
    info = make_info((8, 16))
    tensor, terms = with_super_weights(info, spec, rank)
    back, named = pack_and_unpack(ENGINE, tensor, terms)
    assert back.decode().tobytes() == tensor.decode().tobytes()
    assert named[SUPER_WEIGHTS, f"{info.name}.values"].tolist() == [5, 5, 5]
    parts = {part for part, _ in named}
    if spec is None and not rank:
        assert ADAPTER not in parts  # the plain base holds the values already
        return
    prefix = f"base_model.model.{info.module}"
    a, b = named[ADAPTER, f"{prefix}.lora_A.weight"], named[ADAPTER, f"{prefix}.lora_B.weight"]
    assert a.shape == (rank + 2, 16) and b.shape == (8, rank + 2) and b.dtype == np.float32
    base = (
        tensor.with_(factors=None, outliers=None).decode()
        if spec
        else plain(tensor.with_(factors=None))
    )
    served = base + b.astype(np.float64) @ a.astype(np.float64)
    assert np.abs(served - tensor.decode()).max() < 1e-5
    assert peft.rank_bounds(info, terms) == (rank + 2, rank + 2)


def test_adapter_is_half_precision_without_super_weights() -> None:
    info = make_info((8, 16))
    tensor, terms = with_super_weights(info, CodesSpec(4, 8, True, "F16"), 3)
    tensor = tensor.with_(outliers=None)
    terms = dataclasses.replace(terms, outliers=exact(0), outlier_columns=exact(0))
    _, named = pack_and_unpack(ENGINE, tensor, terms)
    assert {a.dtype for (part, _), a in named.items() if part == ADAPTER} == {np.dtype(np.float16)}


def test_open_super_weight_counts_give_bounds() -> None:
    info = make_info((8, 16))
    for rank in (0, 4):
        terms = Terms(
            codes=CodesSpec(4, 8, True, "F16"), rank=rank, outliers=(0, 5), outlier_columns=(0, 3)
        )
        least, most = bounds(ENGINE, info, terms)
        for end in range(2):
            size = bounds(ENGINE, info, terms.at(end))[0]
            assert least <= size <= most


def test_adapter_config_ranks() -> None:
    infos = [make_info((8, 16), name=f"model.layers.{i}.fc.weight") for i in (1, 11)]
    codes = CodesSpec(4, 8, True, "F16")
    entries = [Entry(infos[0], Terms(codes=codes, rank=2)), Entry(infos[1], Terms(rank=9))]
    config = peft.config(entries)
    assert config is not None
    assert config["r"] == config["lora_alpha"] == 9
    assert config["target_modules"] == ["model.layers.1.fc", "model.layers.11.fc"]
    for info, rank in zip(infos, (2, 9), strict=True):
        name = f"outer.{info.module}"
        found = [r for k, r in config["rank_pattern"].items() if re.match(rf"(.*\.)?({k})$", name)]
        assert found == [rank]
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert peft.max_lora_rank(entries) == 16
    assert peft.max_lora_rank([]) == 0
    assert peft.max_lora_rank([Entry(infos[0], Terms(rank=600))]) is None
    assert peft.config([Entry(infos[0], Terms(codes=codes))]) is None


def test_notes_say_how_to_load_the_adapter() -> None:
    infos = [make_info((8, 1024), name=f"model.layers.{i}.fc.weight") for i in range(3)]
    codes = CodesSpec(4, 8, True, "F16")
    super_weights = Terms(codes=codes, rank=16, outliers=exact(3), outlier_columns=exact(2))
    lines = ENGINE.notes([Terms(), Terms(codes=codes), super_weights], infos)
    assert lines[0] == "adapter: rank up to 18; vLLM: --enable-lora --max-lora-rank 32"
    assert "forward pass" in lines[1] and "PeftModel" in lines[1] and len(lines) == 2
    assert ENGINE.notes([Terms(), Terms(codes=codes), Terms(nonzeros=(1, 1))], infos) == []
    assert len(ENGINE.notes([Terms(), Terms(), Terms(nonzeros=(1, 1), rank=2)], infos)) == 1
    (line,) = ENGINE.notes([Terms(), Terms(), Terms(nonzeros=(1, 1), rank=600)], infos)
    assert "600" in line and "512" in line
    assert NATIVE.notes([super_weights], infos[:1]) == []


def test_only_the_engines_base_stands_alone() -> None:
    assert ENGINE.base_stands_alone
    assert not NATIVE.base_stands_alone and not DENSE.base_stands_alone


# -- metadata --------------------------------------------------------------------------------


def test_metadata_round_trip_is_canonical() -> None:
    infos = [
        make_info((8, 16), "BF16"),
        make_info((2, 4, 8), "F16", Role.EXPERTS, "a"),
        make_info((3, 2, 3, 3), "F32", Role.CONV, 'odd "name" \u00e9'),
    ]
    terms = [
        Terms(nonzeros=(5, 5), codes=CodesSpec(3, 7, False, "BF16")),
        Terms(rank=4, factor_dtype="I8", codes=CodesSpec(8, 8, True, "F32", True)),
        Terms(nonzeros=(0, 0), outliers=(4, 4), outlier_columns=(2, 2)),
    ]
    entries = [Entry(i, t) for i, t in zip(infos, terms, strict=True)]
    encoded = metadata.encode("native", entries)
    assert encoded["format"] == "pt"
    assert encoded == metadata.encode("native", entries[::-1])
    record = metadata.decode(encoded)
    assert record.format == "native"
    by_name = {e.info.name: e for e in record.entries}
    for entry in entries:
        back = by_name[entry.info.name]
        assert back.terms == entry.terms
        assert back.info == dataclasses.replace(entry.info, file="")
    assert metadata.encode("dense", entries) == {"format": "pt"}


def test_metadata_carries_what_others_wrote() -> None:
    theirs = {"format": "tf", "title": "t", "compress": "not ours"}
    cast = {"norm.weight": "F32"}
    found = metadata.encode("native", [], source_metadata=theirs, cast=cast)
    assert found["title"] == "t" and found["format"] == "pt"
    record = metadata.decode(found)
    assert record.source_metadata == {"format": "tf"} and record.cast == cast
    assert record.entries == ()
    assert metadata.encode("dense", [], source_metadata=theirs) == {"format": "tf", "title": "t"}
    plain = metadata.encode("native", [], source_metadata={"format": "pt"}, cast={})
    assert plain == metadata.encode("native", [])


GOOD: dict[str, Any] = {
    "dtype": "F32", "shape": [8, 16], "role": "linear",
    "bits": 4, "group_size": 16, "symmetric": True, "scale_dtype": "F16",
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "I64"}, {"dtype": 3}, {"shape": [8, -1]}, {"shape": [8, 1.0]}, {"shape": "8"},
        {"shape": []}, {"shape": [True, 8]}, {"shape": [1 << 40, 1 << 40]}, {"role": "boss"},
        {"bits": 1}, {"bits": 9}, {"bits": "4"}, {"bits": True}, {"group_size": 0},
        {"symmetric": 1}, {"scale_dtype": "F64"}, {"per_tensor": "yes"}, {"rank": 2},
        {"rank": 17, "factor_dtype": "F16"}, {"rank": -1, "factor_dtype": "F16"},
        {"factor_dtype": "F16"}, {"rank": 2, "factor_dtype": "I64"}, {"nonzeros": 129},
        {"nonzeros": [1, 2]}, {"outliers": 1}, {"outliers": 1, "outlier_columns": 17},
        {"unknown": 1}, {"role": "experts"}, {"bits": None}, {"rank": 0, "factor_dtype": "F16"},
        {"outliers": 0, "outlier_columns": 0}, {"outliers": 1, "outlier_columns": 2},
    ],
)  # fmt: skip
def test_metadata_refuses(change: dict[str, Any]) -> None:
    body = {"version": 1, "format": "native", "tensors": {"a.weight": GOOD | change}}
    with pytest.raises(InputError):
        metadata.decode({"compress": json.dumps(body)})


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "null", "{" * 100_000,
        '{"version":2,"format":"native","tensors":{}}',
        '{"version":true,"format":"native","tensors":{}}',
        '{"version":1,"format":3,"tensors":{}}',
        '{"version":1,"format":"native","tensors":[]}',
        '{"version":1,"format":"native","tensors":{"a":3}}',
        '{"version":1,"format":"native","tensors":{},"more":1}',
        '{"version":1,"format":"native","tensors":{},"cast":[]}',
        '{"version":1,"format":"native","tensors":{},"cast":{"a":"I64"}}',
        '{"version":1,"format":"native","tensors":{},"cast":{"a":3}}',
        '{"version":1,"format":"native","tensors":{},"source_metadata":"x"}',
        '{"version":1,"format":"native","tensors":{},"source_metadata":{"a":1}}',
        '{"version":1,"format":"native","tensors":{},"source_metadata":{"compress":"{}"}}',
        '{"version":1,"version":1,"format":"native","tensors":{}}',
    ],
)  # fmt: skip
def test_metadata_refuses_malformed_text(text: str) -> None:
    with pytest.raises(InputError):
        metadata.decode({"compress": text})
    with pytest.raises(InputError):
        metadata.decode({"format": "pt"})


@pytest.mark.parametrize("missing", ["dtype", "shape", "role", "bits", "scale_dtype"])
def test_metadata_refuses_missing_fields(missing: str) -> None:
    fields = {k: v for k, v in GOOD.items() if k != missing}
    body = {"version": 1, "format": "native", "tensors": {"a.weight": fields}}
    with pytest.raises(InputError, match=missing):
        metadata.decode({"compress": json.dumps(body)})


# -- output directories ----------------------------------------------------------------------


def write_output(
    directory: Path,
    fmt: Format,
    tensors: Mapping[str, tuple[Tensor, Terms]],
    untouched: Mapping[str, Array],
    config: dict[str, Any],
) -> None:
    """A small writer of its own: everything in one file a part."""
    entries = [Entry(t.info, terms) for t, terms in tensors.values()]
    parts: dict[str, dict[str, Array]] = {MODEL: dict(untouched)}
    for tensor, terms in tensors.values():
        for (part, name), array in fmt.pack(tensor, terms).items():
            parts.setdefault(part, {})[name] = array
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "manifest.json").write_text("{}")
    infos = [t.info for t, _ in tensors.values()]
    for name, content in fmt.extra_files(entries, config, infos).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    files = {MODEL: "model" + fmt.weights_suffix, **PART_FILES}
    for part, arrays in parts.items():
        (directory / files[part]).parent.mkdir(exist_ok=True)
        record = metadata.encode(fmt.name, entries) if part == MODEL else {"format": "pt"}
        save_file(arrays, directory / files[part], metadata=record)


def example(directory: Path, fmt: Format) -> dict[str, Tensor]:
    spec = CodesSpec(4, 8, True, "F16")
    first, first_terms = with_super_weights(make_info((8, 16), "BF16"), spec, 2)
    info = make_info((8, 16), "F16", name="model.layers.1.mlp.up_proj.weight")
    second = Tensor(info, make_source(info), mask=np.eye(8, 16, dtype=np.bool_))
    tensors = {
        "a": (first, first_terms),
        "b": (second, Terms(nonzeros=exact(8))),
    }
    norm = np.ones(16, np.float32)
    write_output(directory, fmt, tensors, {"model.norm.weight": norm}, {"model_type": "llama"})
    return {t.info.name: t for t, _ in tensors.values()}


@pytest.mark.parametrize("fmt", [NATIVE, ENGINE], ids=lambda f: f.name)
def test_an_output_opens_as_its_source(tmp_path: Path, fmt: Format) -> None:
    tensors = example(tmp_path / "out", fmt)
    assert is_compressed(tmp_path / "out")
    with open_any(tmp_path / "out") as checkpoint:
        infos = {i.name: i for i in checkpoint.infos()}
        assert set(infos) == {*tensors, "model.norm.weight"}
        for name, tensor in tensors.items():
            info = infos[name]
            assert (info.dtype, info.shape) == (tensor.info.dtype, tensor.info.shape)
            values = checkpoint.read(info)
            assert values.dtype == DTYPES[info.dtype]
            assert values.tobytes() == plain(tensor).tobytes()
            assert checkpoint.read(info, 2, 5).tobytes() == values[2:5].tobytes()
            assert bytes(checkpoint.read_bytes(info, 3, 40)) == values.tobytes()[3:40]
            buffer = bytearray(10)
            checkpoint.read_into(info, 6, memoryview(buffer))
            assert buffer == values.tobytes()[6:16]
            with pytest.raises(UsageError):
                checkpoint.read(info, 5, 9)
        assert checkpoint.read(infos["model.norm.weight"]).tolist() == [1] * 16
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.sidecars == ["tokenizer.json"]
        with pytest.raises(UsageError):
            checkpoint.info("nothing")
        assert len(checkpoint.fingerprint()) == len(checkpoint.content_hash()) == 64
        checkpoint.check_unchanged()
    with open_output(tmp_path / "out") as output:
        tensor = output.tensor("model.layers.0.mlp.up_proj.weight")
        assert tensor.codes is not None and tensor.factors is not None
        assert tensor.outliers is not None and tensor.outliers.in_scale == (fmt is ENGINE)
        assert output.tensor("model.norm.weight").decode().tolist() == [[1] * 16]


@pytest.mark.parametrize("fmt", [NATIVE, ENGINE], ids=lambda f: f.name)
def test_shards_carry_a_record_each(tmp_path: Path, fmt: Format) -> None:
    spec = CodesSpec(4, 8, True, "F16")
    weight_map: dict[str, str] = {}
    expected: Arrays = {}
    for number in (1, 2):
        info = make_info((8, 16), name=f"model.layers.{number}.mlp.up_proj.weight")
        source, codes = quantize(info, spec, seed=number)
        tensor = Tensor(info, source, codes=codes)
        named = fmt.pack(tensor, Terms(codes=spec))
        file = f"model-{number:05d}-of-00002{fmt.weights_suffix}"
        arrays = {name: array for (_, name), array in named.items()}
        entries = [Entry(info, Terms(codes=spec))]
        save_file(arrays, tmp_path / file, metadata=metadata.encode(fmt.name, entries))
        weight_map |= dict.fromkeys(arrays, file)
        expected[info.name] = tensor.decode()
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / f"model{fmt.weights_suffix}.index.json").write_text(json.dumps(index))
    assert is_compressed(tmp_path)
    with open_any(tmp_path) as checkpoint:
        found = {i.name: checkpoint.read(i) for i in checkpoint.infos()}
    assert {n: v.tobytes() for n, v in found.items()} == {
        n: v.tobytes() for n, v in expected.items()
    }


def test_a_plain_checkpoint_opens_as_itself(tmp_path: Path) -> None:
    save_file({"a.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    assert not is_compressed(tmp_path)
    with open_any(tmp_path) as checkpoint:
        assert [i.name for i in checkpoint.infos()] == ["a.weight"]
    with pytest.raises(CompressError):
        open_output(tmp_path / "nothing")


def test_one_file_of_an_output_is_not_a_checkpoint(tmp_path: Path) -> None:
    example(tmp_path / "out", NATIVE)
    with pytest.raises(UsageError, match="one file of a compressed"):
        open_any(tmp_path / "out" / "model.compress.safetensors")


Arrays = dict[str, Array]
PREFIX = "model.layers.0.mlp.up_proj.weight"


def _drop_scale(arrays: Arrays) -> None:
    del arrays[f"{PREFIX}.scale"]


def _shorten_codes(arrays: Arrays) -> None:
    arrays[f"{PREFIX}.codes"] = arrays[f"{PREFIX}.codes"][:-1]


def _retype_scale(arrays: Arrays) -> None:
    arrays[f"{PREFIX}.scale"] = arrays[f"{PREFIX}.scale"].astype(np.float32)


def _add_original(arrays: Arrays) -> None:
    arrays[PREFIX] = np.zeros((8, 16), np.float32)


@pytest.mark.parametrize(
    "damage", [_drop_scale, _shorten_codes, _retype_scale, _add_original], ids=lambda f: f.__name__
)
def test_an_output_that_contradicts_its_record_is_refused(
    tmp_path: Path, damage: Callable[[Arrays], None]
) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file

    example(tmp_path / "out", NATIVE)
    file = tmp_path / "out" / "model.compress.safetensors"
    with safe_open(file, "np") as opened:
        record = opened.metadata()
    arrays = load_file(file)
    damage(arrays)
    save_file(arrays, file, metadata=record)
    with pytest.raises(InputError):
        open_output(tmp_path / "out")


def test_errors_of_a_record_name_its_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    example(tmp_path / "out", NATIVE)
    file = tmp_path / "out" / "model.compress.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "compress": "{"})
    with pytest.raises(InputError, match=r"model\.compress\.safetensors: the record .* JSON"):
        open_output(tmp_path / "out")


def test_values_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    example(tmp_path / "out", NATIVE)
    file = tmp_path / "out" / "super_weights.safetensors"
    arrays = load_file(file)
    arrays[f"{PREFIX}.rows"][:] = 99
    save_file(arrays, file)
    with open_output(tmp_path / "out") as output, pytest.raises(InputError, match="outside"):
        output.tensor(PREFIX)
    file.unlink()
    with pytest.raises(InputError, match="missing"):
        open_output(tmp_path / "out")


def test_a_mask_that_keeps_another_count_is_refused() -> None:
    info = make_info((8, 16))
    spec = CodesSpec(4, 8, True, "F16")
    mask = np.zeros((8, 16), np.bool_)
    mask[:, ::4] = True
    source, codes = quantize(info, spec, mask)
    for tensor, terms in (
        (Tensor(info, source, mask=mask, codes=codes), Terms(nonzeros=exact(32), codes=spec)),
        (Tensor(info, source, mask=mask), Terms(nonzeros=exact(32))),
    ):
        _, named = pack_and_unpack(NATIVE, tensor, terms)
        named[MODEL, f"{info.name}.mask"][0] = 255
        with pytest.raises(InputError, match="keeps another number"):
            NATIVE.unpack(Entry(info, terms), fetch_from(named))
