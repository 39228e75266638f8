"""One PEFT LoRA adapter beside the weights: the low-rank term and a column a super-weight column.

LoRA adds B @ A to a module's weight, which is the low-rank term itself. A super weight W[i, j] is
restored by one more rank: its row of A selects column j, its column of B holds the difference at
row i. Entries that share a column share the rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.formats.arrays import damaged, plain
from compress.formats.base import ADAPTER, ArraySpec, Entry, Fetch, Named
from compress.passes.base import Terms
from compress.tensor import DTYPES, Array, Factors, Role, Tensor, TensorInfo

CONFIG_FILE = "adapter/adapter_config.json"
DTYPE_TAGS = frozenset({"F16", "BF16", "F32"})
# What vLLM takes for --max-lora-rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_ROLES = frozenset({Role.LINEAR, Role.HEAD})


def refuses(info: TensorInfo, terms: Terms) -> str | None:
    """Why the low-rank term cannot be a LoRA adapter, or None."""
    if not terms.rank:
        return None
    if info.role not in _ROLES:
        return f"low-rank factors of a tensor of role {info.role.value}: LoRA adapts Linear modules"
    if not info.name.endswith(".weight"):
        return "low-rank factors of what is no module's weight (its name does not end in .weight)"
    if terms.factor_dtype not in DTYPE_TAGS:
        return f"{terms.factor_dtype} factors: an adapter holds F16, BF16 or F32"
    return None


def rank_bounds(info: TensorInfo, terms: Terms) -> tuple[int, int]:
    """(at least, at most) the rank that the adapter has on this tensor's module; 0 is none."""
    low, high = _columns(info, terms)
    return terms.rank + low, terms.rank + high


def max_lora_rank(entries: Sequence[Entry]) -> int | None:
    """The smallest --max-lora-rank with which vLLM takes the adapter.

    0 where there is no adapter, None where its rank is beyond what vLLM offers.
    """
    need = max(_ranks(entries).values(), default=0)
    if not need:
        return 0
    return next((rank for rank in VLLM_RANKS if rank >= need), None)


def layout(info: TensorInfo, terms: Terms) -> list[ArraySpec]:
    """lora_A [rank, in] and lora_B [out, rank], or nothing.

    lora_B is F32 where it carries differences. While their number is open, lora_B is one U8
    vector whose bounds are bytes.
    """
    low, high = rank_bounds(info, terms)
    if not high:
        return []
    rows, columns = info.matrix_shape
    a_name, b_name = adapter_names(info)
    fewest, most = _columns(info, terms)
    dtype = "F32" if most else terms.factor_dtype
    if low == high:
        a = ArraySpec(ADAPTER, a_name, terms.factor_dtype, (high, columns))
        return [a, ArraySpec(ADAPTER, b_name, dtype, (rows, high))]
    a = ArraySpec(ADAPTER, a_name, terms.factor_dtype, (low, columns), high)
    least = low * rows * DTYPES["F32" if fewest else terms.factor_dtype].itemsize
    return [a, ArraySpec(ADAPTER, b_name, "U8", (least,), high * rows * DTYPES[dtype].itemsize)]


def pack(tensor: Tensor, terms: Terms, named: Named) -> None:
    """Add the adapter's arrays, if the tensor has any. Raises ValueError for an open count."""
    info = tensor.info
    low, high = rank_bounds(info, terms)
    if not high:
        return
    columns = _distinct_columns(tensor) if _columns(info, terms)[1] else np.zeros(0, np.int64)
    if low != high or terms.rank + columns.size != high:
        raise ValueError(f"{info.name}: the super-weight columns must be counted before packing")
    a_dtype = DTYPES[terms.factor_dtype]
    a = np.zeros((high, info.matrix_shape[1]), a_dtype)
    b = np.zeros((info.matrix_shape[0], high), np.float32 if columns.size else a_dtype)
    if tensor.factors is not None:
        a[: terms.rank], b[:, : terms.rank] = tensor.factors.a, tensor.factors.b
    if columns.size:
        a[terms.rank + np.arange(columns.size), columns] = 1
        _add_differences(tensor, columns, b[:, terms.rank :])
    a_name, b_name = adapter_names(info)
    named[ADAPTER, a_name], named[ADAPTER, b_name] = a, b


def unpack_factors(info: TensorInfo, terms: Terms, fetch: Fetch) -> Factors | None:
    """The low-rank term alone, in its own dtype: the further ranks are not part of the formula."""
    if not terms.rank:
        return None
    a_name, b_name = adapter_names(info)
    a, b = fetch(ADAPTER, a_name), fetch(ADAPTER, b_name)
    if a.shape[0] != b.shape[1] or a.shape[0] < terms.rank:
        raise damaged(info, "lora_A and lora_B differ in rank")
    dtype = DTYPES[terms.factor_dtype]
    return Factors(
        np.ascontiguousarray(b[:, : terms.rank].astype(dtype)),
        np.ascontiguousarray(a[: terms.rank]),
    )


def config(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """adapter_config.json, or None where no tensor has an adapter. alpha = rank: scale 1."""
    ranks = _ranks(entries)
    return _config(ranks, named=len(set(ranks.values())) > 1) if ranks else None


def _ranks(entries: Sequence[Entry]) -> dict[str, int]:
    """The rank of every module that has one; the highest where counts are open."""
    ranks = {e.info.module: rank_bounds(e.info, e.terms)[1] for e in entries}
    return {module: rank for module, rank in ranks.items() if rank}


def _config(ranks: Mapping[str, int], *, named: bool) -> dict[str, Any]:
    """The config; `named` lists the rank of every module, for ranks that differ."""
    largest = max(ranks.values())
    pattern: dict[str, int] = {}
    if named:
        # PEFT takes the first key that matches the end of a module's name, so that a name that
        # ends in another name must come first. `a.1` does not match `a.11`: keys end on a dot.
        for module in sorted(ranks, key=lambda name: (-len(name), name)):
            pattern[re.escape(module)] = ranks[module]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }


def config_files(entries: Sequence[Entry]) -> dict[str, bytes]:
    """adapter_config.json by its path in the output, where there is an adapter."""
    found = config(entries)
    if found is None:
        return {}
    return {CONFIG_FILE: _text(found)}


def config_slack(entries: Sequence[Entry]) -> tuple[int, int]:
    """(below, above) what adapter_config.json takes at the low and at the high end of the counts.

    Ranks that are alike at one end and differ elsewhere are listed there, and the reverse.
    """
    slack = []
    for end in (0, 1):
        ranks = _ranks([Entry(e.info, e.terms.at(end)) for e in entries])
        texts = [len(_text(_config(ranks, named=n))) if ranks else 0 for n in (False, True)]
        now = texts[len(set(ranks.values())) > 1]
        slack.append(now - texts[0] if end == 0 else texts[1] - now)
    return slack[0], slack[1]


def notes(entries: Sequence[Entry]) -> list[str]:
    """How to load the adapter, where there is one."""
    need = max(_ranks(entries).values(), default=0)
    if not need:
        return []
    allowed = max_lora_rank(entries)
    flags = f"--enable-lora --max-lora-rank {allowed}"
    if allowed is None:
        flags = f"takes at most rank {VLLM_RANKS[-1]}"
    found = [f"adapter: rank up to {need}; vLLM: {flags}"]
    if any(e.terms.codes is not None for e in entries):
        found.append("adapter: transformers needs one forward pass before PeftModel")
    return found


def _text(found: Mapping[str, Any]) -> bytes:
    return (json.dumps(found, indent=2) + "\n").encode()


def adapter_names(info: TensorInfo) -> tuple[str, str]:
    """The adapter's arrays of a tensor: lora_A, lora_B."""
    prefix = f"base_model.model.{info.module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _columns(info: TensorInfo, terms: Terms) -> tuple[int, int]:
    """Ranks for super weights. A plain base holds them exactly, unless factors are added to it."""
    if info.role not in _ROLES or (terms.codes is None and not terms.rank):
        return 0, 0
    return terms.outlier_columns


def _distinct_columns(tensor: Tensor) -> NDArray[np.int64]:
    if tensor.outliers is None:
        return np.zeros(0, np.int64)
    return np.unique(tensor.outliers.columns)


def _add_differences(tensor: Tensor, columns: NDArray[np.int64], b: Array) -> None:
    """b[i, k] = the exact value minus what base and factors give, at row i of column k."""
    outliers = tensor.outliers
    if outliers is None:
        return
    if tensor.codes is not None:
        base = tensor.with_(outliers=None).decode()
    else:
        base = plain(tensor.with_(factors=None)).astype(np.float32)
        if tensor.factors is not None:
            tensor.factors.add_to(base)
    rows = outliers.rows
    there = base[rows, outliers.columns]
    b[rows, np.searchsorted(columns, outliers.columns)] = outliers.values.astype(np.float32) - there
