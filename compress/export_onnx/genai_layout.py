"""The checkpoint layout that onnxruntime-genai's model builder reads as `quant_method: olive`.

Read from onnxruntime_genai/models/loaders/{base,olive}.py of version 0.18. Per linear layer `<m>`:

    <m>.qweight  U8 [out, in * bits / 8]                codes, low bits first along a row
    <m>.scales   F16, BF16 or F32 [out, in / group]
    <m>.qzeros   U8 [out, ceil(in / group * bits / 8)]  zero points, packed likewise

and w = (q - zero_point) * scale. The bytes are those of onnxruntime's MatMulNBits, whose groups are
powers of two from 16 up and divide a row. Zero points are always there: the builder concatenates
those of q, k and v without looking whether they exist.

Other groups are cut into smaller ones that share a scale, which decodes to the same weights. Where
the inner width of an MLP is no multiple of its groups (172 columns), it grows by neurons of zeros:
act(0) * 0 = 0 for the activations of gated MLPs, so that the model computes what it did.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, UsageError, show
from compress.formats.arrays import pack_rows, packed_bytes, zero_codes
from compress.output import CompressedCheckpoint
from compress.passes.base import CodesSpec
from compress.tensor import Array, Codes, Role, TensorInfo

MIN_GROUP = 16
MAX_GROUP = {2: 128, 4: 4096, 8: 4096}  # 2 bits beyond 128 run on onnxruntime's slow path, or not
_PADDED_GROUP = 32  # where one scale serves a row that no power of two from 16 up divides
_HELD = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # bits of the codes -> bits they are stored in
_LAYER = r"model\.(?:language_model\.)?layers\.\d+\."
_LINEAR = re.compile(
    rf"(?:{_LAYER}(?:self_attn\.(?:[qkvo]|qkv)_proj|mlp\.(?:gate|up|down|gate_up)_proj)|lm_head)"
    r"\.weight"
)
_ONNX = "compress export --to onnx carries it"

Spec = tuple[str, str, tuple[int, ...]]  # name, safetensors tag, shape


@dataclass(frozen=True)
class Linear:
    """One layer of codes as the builder wants it.

    rows            [first, last) of the tensor's matrix: a fused tensor becomes several layers
    out, columns    the layer's shape, which neurons of zeros may have made larger
    """

    info: TensorInfo
    codes: CodesSpec
    module: str
    rows: tuple[int, int]
    out: int
    columns: int
    bits: int
    group: int

    @property
    def specs(self) -> list[Spec]:
        """The three arrays, in the order they are written."""
        groups = self.columns // self.group
        return [
            (f"{self.module}.qweight", "U8", (self.out, packed_bytes(self.columns, self.bits))),
            (f"{self.module}.scales", self.codes.scale_dtype, (self.out, groups)),
            (f"{self.module}.qzeros", "U8", (self.out, packed_bytes(groups, self.bits))),
        ]

    def pack(self, codes: Codes) -> list[Array]:
        """The three arrays from the codes of the whole tensor."""
        values = codes.values[self.rows[0] : self.rows[1]]
        count, columns = values.shape
        shape = codes.values.shape[0], codes.scale.shape[1]
        scale = np.broadcast_to(codes.scale, shape)[self.rows[0] : self.rows[1]]
        zeros = zero_codes(codes.zero_point, codes.bits, shape[0])[self.rows[0] : self.rows[1]]
        zeros = np.broadcast_to(zeros, scale.shape)
        of_group = np.minimum(
            np.arange(0, self.columns, self.group) // codes.group_size, scale.shape[1] - 1
        )
        wide = self._empty(self.columns, np.dtype(np.uint8))
        wide[:count, :columns] = values
        wide[:count, columns:] = zeros[:, -1:]
        scales = self._empty(of_group.size, scale.dtype)
        scales[:count] = scale[:, of_group]
        points = self._empty(of_group.size, np.dtype(np.uint8))
        points[:count] = zeros[:, of_group]
        return [self._packed(wide), scales, self._packed(points)]

    def _empty(self, columns: int, dtype: np.dtype[Any]) -> Array:
        """Rows of zeros where the layer has more of them than the tensor."""
        return np.zeros((self.out, columns), dtype)

    def _packed(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return pack_rows(values, self.bits, packed_bytes(values.shape[1], self.bits))


@dataclass(frozen=True)
class Layout:
    """What is written: layers of codes, tensors as they are, the config, options of the builder."""

    linears: tuple[Linear, ...]
    dense: tuple[TensorInfo, ...]
    config: dict[str, Any]
    extra_options: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def parts(self) -> Iterator[tuple[Linear | TensorInfo, list[Spec]]]:
        """Everything that is written, with its arrays."""
        for info in self.dense:
            yield info, [(info.name, info.dtype, info.shape)]
        for linear in self.linears:
            yield linear, linear.specs


def plan_layout(checkpoint: CompressedCheckpoint) -> Layout:
    """The layout of an output of this tool. From headers alone.

    Raises UsageError for what the builder has no place for, naming the tensor and the way out.
    """
    config = _config(checkpoint)
    linears: list[Linear] = []
    dense: list[TensorInfo] = []
    notes: list[str] = []
    decoded = 0
    for info in checkpoint.infos():
        entry = checkpoint.entries.get(info.name)
        codes = None if entry is None else entry.terms.codes
        if _LINEAR.fullmatch(info.name) and (codes is not None or info.module != "lm_head"):
            linears += _linears(checkpoint, info, config)
        elif codes is None or info.role in (Role.EMBEDDING, Role.HEAD):
            decoded += 0 if codes is None else info.nbytes
            dense.append(info)
        else:
            raise UsageError(
                f"tensor {show(info.name)}: the builder takes codes in the projections of attention"
                " and of dense MLPs and in lm_head alone",
                hint=f"{_ONNX}; or ignore the tensor in the recipe",
            )
    if not linears:
        raise UsageError(
            f"{show(str(checkpoint.path))}: no layer of codes that the builder takes",
            hint="quantize the linear layers to 4 or 8 bits first",
        )
    if decoded:
        notes.append(f"embedding tables are written decoded ({decoded:,} bytes)")
    linears, config = _with_whole_groups(linears, config, {i.name for i in dense}, notes)
    _note_changes(linears, notes)
    config["quantization_config"] = _quantization(linears)
    options = _builder_options(linears, notes)
    return Layout(tuple(linears), tuple(dense), config, options, tuple(notes))


def _config(checkpoint: CompressedCheckpoint) -> dict[str, Any]:
    config = checkpoint.config
    architectures = (config or {}).get("architectures")
    if config is None or not isinstance(architectures, list) or not architectures:
        raise UsageError(
            f"{show(str(checkpoint.path))}: no config.json that names an architecture",
            hint="the builder works on Hugging Face language models; --to onnx takes others",
        )
    return {k: v for k, v in config.items() if k != "quantization_config"}


def _linears(
    checkpoint: CompressedCheckpoint, info: TensorInfo, config: Mapping[str, Any]
) -> list[Linear]:
    """The layers that one tensor becomes. Raises UsageError."""
    entry = checkpoint.entries.get(info.name)
    terms = None if entry is None else entry.terms
    if terms is None or terms.codes is None:
        raise UsageError(
            f"tensor {show(info.name)}: not quantized, and the builder takes decoder layers of"
            " codes alone",
            hint="quantize it too (8 bits lose little), or use compress export --to onnx",
        )
    for found, what in ((terms.rank, "a low-rank term"), (terms.outliers[1], "super weights")):
        if found:
            raise UsageError(
                f"tensor {show(info.name)}: {what} beside its codes has no place in the builder's"
                " layout",
                hint=f"{_ONNX}; or compress without it",
            )
    codes, columns = terms.codes, info.matrix_shape[1]
    bits = _HELD[codes.bits]
    group = _group(info, codes, columns, bits)
    return [
        Linear(info, codes, module, rows, rows[1] - rows[0], columns, bits, group)
        for module, rows in _pieces(info, config)
    ]


def _group(info: TensorInfo, codes: CodesSpec, columns: int, bits: int) -> int:
    """The largest group that the engine takes and that the tensor's groups consist of."""
    one = codes.per_tensor or codes.group_size >= columns
    size = columns if one else codes.group_size
    group = min(size & -size, MAX_GROUP[bits])
    if group >= MIN_GROUP:
        return group
    if one:
        return _PADDED_GROUP
    raise UsageError(
        f"tensor {show(info.name)}: groups of {size} columns, and onnxruntime takes multiples of"
        f" {MIN_GROUP}",
        hint="quantize with group=32, 64 or 128",
    )


def _pieces(info: TensorInfo, config: Mapping[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    """(module, rows) of a tensor, of its parts where it is fused.

    The builder cuts fused zero points at the wrong row, so they are cut here.
    """
    parent, _, last = info.module.rpartition(".")
    rows = info.matrix_shape[0]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    if last == "qkv_proj":
        heads = _number(config, "num_attention_heads")
        given = config.get("head_dim") is not None
        size = _number(config, "head_dim") if given else _number(config, "hidden_size") // heads
        grouped = config.get("num_key_value_heads") is not None
        inner = (_number(config, "num_key_value_heads") if grouped else heads) * size
        names, sizes = ("q_proj", "k_proj", "v_proj"), (heads * size, inner, inner)
    elif last == "gate_up_proj":
        names, sizes = ("gate_proj", "up_proj"), (rows // 2, rows // 2)
    else:
        return [(info.module, (0, rows))]
    if sum(sizes) != rows:
        raise InputError(
            f"tensor {show(info.name)}: {rows} rows, and by config.json it has {sum(sizes)}"
        )
    ends = np.cumsum(sizes).tolist()
    return [
        (f"{parent}.{name}", (end - size, end))
        for name, size, end in zip(names, sizes, ends, strict=True)
    ]


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"config.json: {key} is not a positive number")
    return value


def _with_whole_groups(
    linears: Sequence[Linear], config: dict[str, Any], dense: set[str], notes: list[str]
) -> tuple[list[Linear], dict[str, Any]]:
    """Widen MLPs by neurons of zeros where their groups do not divide a row. Raises UsageError."""
    broken = [one for one in linears if one.columns % one.group]
    if not broken:
        return list(linears), config
    for one in broken:
        if not one.module.endswith(".mlp.down_proj") or any(
            f"{one.module.removesuffix('down_proj')}{name}_proj.bias" in dense
            for name in ("gate", "up")
        ):
            raise UsageError(
                f"tensor {show(one.info.name)}: groups of {one.group} do not divide its"
                f" {one.columns} columns",
                hint=f"quantize with a group that does (16 is the smallest); {_ONNX}",
            )
    inner = broken[0].columns
    if config.get("intermediate_size") != inner:
        raise InputError(
            f"tensor {show(broken[0].info.name)}: {inner} columns, and config.json has an"
            f" intermediate_size of {show(str(config.get('intermediate_size')))}"
        )
    step = max(one.group for one in linears if one.module.endswith(".mlp.down_proj"))
    wide = -(-inner // step) * step
    notes.append(
        f"the MLPs have {wide - inner} neurons of zeros more ({inner} -> {wide}), so that groups"
        " divide a row; the model computes the same"
    )
    return [_widened(one, inner, wide) for one in linears], config | {"intermediate_size": wide}


def _widened(one: Linear, inner: int, wide: int) -> Linear:
    if one.module.endswith(".mlp.down_proj") and one.columns == inner:
        return replace(one, columns=wide)
    if one.module.endswith((".mlp.gate_proj", ".mlp.up_proj")) and one.out == inner:
        return replace(one, out=wide)
    return one


def _note_changes(linears: Sequence[Linear], notes: list[str]) -> None:
    """Say what is stored in more bytes than in the output that it comes from."""
    wider = Counter((one.codes.bits, one.bits) for one in linears if one.bits != one.codes.bits)
    for (bits, held), count in sorted(wider.items()):
        notes.append(f"{count} layers of {bits} bits are stored in {held}, with the same values")
    finer = sum(one.columns // one.group > one.codes.groups(one.columns) for one in linears)
    if finer:
        notes.append(
            f"{finer} layers repeat their scales: onnxruntime takes groups that are powers of two"
        )


def _quantization(linears: Sequence[Linear]) -> dict[str, Any]:
    """`quantization_config`: the commonest width and group, and the layers that differ."""
    counts = Counter((one.bits, one.group) for one in linears)
    bits, group = min(counts, key=lambda pair: (-counts[pair], pair))
    overrides = {
        one.module.replace("model.language_model.", "model."): {
            "bits": one.bits,
            "group_size": one.group,
        }
        for one in linears
        if (one.bits, one.group) != (bits, group)
    }
    return {
        "quant_method": "olive",
        "bits": bits,
        "group_size": group,
        "symmetric": False,
        "lm_head": any(one.module == "lm_head" for one in linears),
        "overrides": overrides,
    }


def _builder_options(linears: Sequence[Linear], notes: list[str]) -> dict[str, str]:
    """What the builder must be told so that the weights stay what they are."""
    options = {"hf_remote": "false"}
    kept = ["/model/embed_tokens/Gather"]
    if any(one.module == "lm_head" for one in linears):
        options["shared_embeddings"] = "false"  # the table is not made of the head's codes
    else:
        kept.append("/lm_head/MatMul")  # the builder would round it to 4 bits by itself
    options["nodes_to_exclude"] = ",".join(kept)
    attention: dict[str, set[tuple[int, int]]] = {}
    for one in linears:
        parent, _, last = one.module.rpartition(".")
        if last in ("q_proj", "k_proj", "v_proj"):
            attention.setdefault(parent, set()).add((one.bits, one.group))
    if any(len(widths) > 1 for widths in attention.values()):
        options["fuse_qkv"] = "false"
        notes.append("q, k and v differ in width: the builder is told not to fuse them")
    return options
