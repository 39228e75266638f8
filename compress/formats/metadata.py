"""The record of the changed tensors, kept as JSON in the weight file's `__metadata__`.

It holds what is needed to decode the arrays, in one canonical spelling (sorted keys, no spaces),
so that equal outputs are equal bytes. What is read back may come from a stranger: every field is
checked, unknown ones are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.checkpoint import strict_json
from compress.checkpoint.source import RECORD_KEY
from compress.errors import InputError, show
from compress.formats.base import Entry
from compress.passes.base import CodesSpec, Terms
from compress.tensor import DTYPES, FLOAT_TAGS, Role, TensorInfo

KEY = RECORD_KEY
FORMAT = "format"  # the entry of `__metadata__` that names the framework; transformers wants "pt"
PYTORCH = "pt"
VERSION = 1
READS = (1,)  # every version that was ever released: each has golden outputs (tests/golden)
_MAX_RANK = 8
_EXPERTS_RANK = 3
_MIN_BITS, _MAX_BITS = 2, 8
_MAX_SIZE = 1 << 48
_CAST_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_SCALE_DTYPES = frozenset({"F16", "BF16", "F32"})
_FACTOR_DTYPES = _SCALE_DTYPES | {"I8"}
_ROLES = {role.value: role for role in Role}


@dataclass(frozen=True)
class Record:
    """What the record of one weight file says.

    source_metadata  entries of the source's `__metadata__` that the file's own could not keep
    cast             tensors stored in another dtype: name -> the original dtype
    """

    format: str
    entries: tuple[Entry, ...]
    source_metadata: Mapping[str, str] = field(default_factory=dict)
    cast: Mapping[str, str] = field(default_factory=dict)


def encode(
    format_name: str,
    entries: Sequence[Entry],
    *,
    source_metadata: Mapping[str, str] | None = None,
    cast: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The `__metadata__` of a weight file. A dense output needs no record.

    source_metadata  `Checkpoint.foreign_metadata` of the source: carried along as it is. Only its
                     "format" must be "pt" beside a record, so the record remembers another one
    cast             unchanged tensors of this file that are stored in another dtype: name -> the
                     original dtype
    """
    foreign = {k: v for k, v in (source_metadata or {}).items() if k != KEY}
    if format_name == "dense":
        return {FORMAT: PYTORCH} | foreign
    body: dict[str, Any] = {
        "version": VERSION,
        "format": format_name,
        "tensors": {entry.info.name: _encode_entry(entry) for entry in entries},
    }
    if foreign.get(FORMAT, PYTORCH) != PYTORCH:
        body["source_metadata"] = {FORMAT: foreign[FORMAT]}
    if cast:
        body["cast"] = dict(cast)
    record = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return foreign | {FORMAT: PYTORCH, KEY: record}


def is_present(mapping: Mapping[str, str]) -> bool:
    """Whether a weight file's `__metadata__` says that this tool wrote it."""
    return KEY in mapping


def decode(mapping: Mapping[str, str]) -> Record:
    """The record in a weight file's `__metadata__`. Raises InputError."""
    if KEY not in mapping:
        raise InputError("the weight file has no record of compressed tensors")
    body = strict_json.parse(
        mapping[KEY].encode("utf-8", "replace"), "the record of compressed tensors", floats=False
    )
    top = _fields(body, "the record", {"version", "format", "tensors"}, {"source_metadata", "cast"})
    if type(top["version"]) is not int or top["version"] not in READS:
        raise InputError(
            f"the record of compressed tensors has version {show(str(top['version']))},"
            f" this program reads up to {VERSION}",
            hint="a newer version of this program wrote it",
        )
    if not isinstance(top["format"], str) or not isinstance(top["tensors"], dict):
        raise InputError("the record of compressed tensors: format or tensors has the wrong type")
    return Record(
        top["format"],
        tuple(_decode_entry(name, raw) for name, raw in top["tensors"].items()),
        _decode_source_metadata(top.get("source_metadata", {})),
        _decode_cast(top.get("cast", {}), top["tensors"]),
    )


def _decode_source_metadata(raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict) or KEY in raw or not all(isinstance(v, str) for v in raw.values()):
        raise InputError("the record of compressed tensors: source_metadata is malformed")
    return raw


def _decode_cast(raw: Any, tensors: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise InputError("the record of compressed tensors: cast is not an object")
    for name, dtype in raw.items():
        where = f"the record of the cast tensor '{show(name)}'"
        _choice(dtype, _CAST_DTYPES, where)
        if name in tensors:
            raise InputError(f"{where}: it is also recorded as changed")
    return raw


def _encode_entry(entry: Entry) -> dict[str, Any]:
    """Fields that are absent mean: no such term."""
    info, terms = entry.info, entry.terms
    if not terms.exact:
        raise ValueError(f"{info.name}: its entries must be counted before they are recorded")
    out: dict[str, Any] = {
        "dtype": info.dtype,
        "shape": list(info.shape),
        "role": info.role.value,
    }
    if terms.nonzeros is not None:
        out["nonzeros"] = terms.nonzeros[0]
    if terms.codes is not None:
        out |= {
            "bits": terms.codes.bits,
            "group_size": terms.codes.group_size,
            "symmetric": terms.codes.symmetric,
            "scale_dtype": terms.codes.scale_dtype,
        }
        if terms.codes.per_tensor:
            out["per_tensor"] = True
    if terms.rank:
        out |= {"rank": terms.rank, "factor_dtype": terms.factor_dtype}
    if terms.outliers[1]:
        out["outliers"] = terms.outliers[0]
        out["outlier_columns"] = terms.outlier_columns[0]
    return out


_REQUIRED = {"dtype", "shape", "role"}
_CODES = {"bits", "group_size", "symmetric", "scale_dtype"}
_OPTIONAL = _CODES | {
    "per_tensor",
    "nonzeros",
    "rank",
    "factor_dtype",
    "outliers",
    "outlier_columns",
}  # fmt: skip


def _decode_entry(name: str, raw: Any) -> Entry:
    where = f"the record of tensor '{show(name)}'"
    if not name:
        raise InputError("the record of compressed tensors: a tensor without a name")
    fields = _fields(raw, where, _REQUIRED, _OPTIONAL)
    info = _decode_info(name, fields, where)
    rows, columns = info.matrix_shape
    # What is not there is left out, so a count that is there is not 0.
    rank = 0
    if "rank" in fields:
        rank = _integer(fields["rank"], 1, max(rows, columns), where, "rank")
    if ("rank" in fields) != ("factor_dtype" in fields):
        raise InputError(f"{where}: rank and factor_dtype go together")
    if ("outliers" in fields) != ("outlier_columns" in fields):
        raise InputError(f"{where}: outliers and outlier_columns go together")
    outliers = outlier_columns = (0, 0)
    if "outliers" in fields:
        outliers = _count(fields, "outliers", info.size, where, least=1)
        most = min(columns, outliers[1])
        outlier_columns = _count(fields, "outlier_columns", most, where, least=1)
    terms = Terms(
        nonzeros=_count(fields, "nonzeros", info.size, where) if "nonzeros" in fields else None,
        codes=_decode_codes(fields, where),
        rank=rank,
        factor_dtype=_choice(fields.get("factor_dtype", "F16"), _FACTOR_DTYPES, where),
        outliers=outliers,
        outlier_columns=outlier_columns,
    )
    return Entry(info, terms)


def _decode_info(name: str, fields: Mapping[str, Any], where: str) -> TensorInfo:
    dtype = _choice(fields["dtype"], FLOAT_TAGS, where)
    role = _ROLES[_choice(fields["role"], frozenset(_ROLES), where)]
    shape = fields["shape"]
    if not isinstance(shape, list) or not 1 <= len(shape) <= _MAX_RANK:
        raise InputError(f"{where}: shape is not a list of 1 to {_MAX_RANK} sizes")
    size = 1
    for dimension in shape:
        size *= _integer(dimension, 0, _MAX_SIZE, where, "shape")
    if size > _MAX_SIZE:
        raise InputError(f"{where}: {size} weights are too many")
    if role is Role.EXPERTS and len(shape) < _EXPERTS_RANK:
        raise InputError(f"{where}: a stack of experts needs three dimensions")
    nbytes = size * DTYPES[dtype].itemsize
    return TensorInfo(name, "", dtype, tuple(shape), nbytes, role=role)


def _decode_codes(fields: Mapping[str, Any], where: str) -> CodesSpec | None:
    present = _CODES & fields.keys()
    if not present:
        if "per_tensor" in fields:
            raise InputError(f"{where}: per_tensor without codes")
        return None
    if present != _CODES:
        raise InputError(f"{where}: {min(_CODES - present)} is missing")
    return CodesSpec(
        bits=_integer(fields["bits"], _MIN_BITS, _MAX_BITS, where, "bits"),
        group_size=_integer(fields["group_size"], 1, _MAX_SIZE, where, "group_size"),
        symmetric=_boolean(fields["symmetric"], where, "symmetric"),
        scale_dtype=_choice(fields["scale_dtype"], _SCALE_DTYPES, where),
        per_tensor=_boolean(fields.get("per_tensor", False), where, "per_tensor"),
    )


def _fields(raw: Any, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: not an object")
    if missing := sorted(required - raw.keys()):
        raise InputError(f"{where}: {missing[0]} is missing")
    if extra := sorted(raw.keys() - required - optional):
        raise InputError(f"{where}: unknown field '{show(extra[0])}'")
    return raw


def _integer(value: Any, low: int, high: int, where: str, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{where}: {what} is not an integer from {low} to {high}")
    return value


def _boolean(value: Any, where: str, what: str) -> bool:
    if type(value) is not bool:
        raise InputError(f"{where}: {what} is neither true nor false")
    return value


def _choice(value: Any, allowed: frozenset[str], where: str) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise InputError(
            f"{where}: '{show(str(value))}' is not one of {', '.join(sorted(allowed))}"
        )
    return value


def _count(
    fields: Mapping[str, Any], what: str, most: int, where: str, *, least: int = 0
) -> tuple[int, int]:
    count = _integer(fields[what], least, most, where, what)
    return count, count
