"""Factors as arrays of the weight file, of any dtype: what native and onnx store."""

from __future__ import annotations

import numpy as np

from compress.formats.base import MODEL, ArraySpec, Fetch, Named
from compress.passes.base import Terms
from compress.tensor import Factors, Role, TensorInfo


def factors_layout(info: TensorInfo, terms: Terms) -> list[ArraySpec]:
    """`.factor_b` and `.factor_a`, int8 ones with a float32 scale a rank; or nothing."""
    if not terms.rank:
        return []
    stack: tuple[int, ...] = ()
    rows, columns = info.matrix_shape
    if info.role is Role.EXPERTS:
        stack, rows = (info.shape[0],), rows // max(info.shape[0], 1)
    rank, dtype, name = terms.rank, terms.factor_dtype, info.name
    specs = [
        ArraySpec(MODEL, f"{name}.factor_b", dtype, (*stack, rows, rank)),
        ArraySpec(MODEL, f"{name}.factor_a", dtype, (*stack, rank, columns)),
    ]
    if dtype == "I8":
        specs += [
            ArraySpec(MODEL, f"{name}.factor_b_scale", "F32", (*stack, rank)),
            ArraySpec(MODEL, f"{name}.factor_a_scale", "F32", (*stack, rank)),
        ]
    return specs


def pack_factors(name: str, factors: Factors, named: Named) -> None:
    """Add the arrays of one tensor's factors."""
    named[MODEL, f"{name}.factor_b"] = np.ascontiguousarray(factors.b)
    named[MODEL, f"{name}.factor_a"] = np.ascontiguousarray(factors.a)
    if factors.b_scale is not None and factors.a_scale is not None:
        named[MODEL, f"{name}.factor_b_scale"] = np.ascontiguousarray(factors.b_scale)
        named[MODEL, f"{name}.factor_a_scale"] = np.ascontiguousarray(factors.a_scale)


def unpack_factors(info: TensorInfo, terms: Terms, fetch: Fetch) -> Factors | None:
    """The inverse of `pack_factors`, None where the terms have no rank."""
    if not terms.rank:
        return None
    b, a = fetch(MODEL, f"{info.name}.factor_b"), fetch(MODEL, f"{info.name}.factor_a")
    if terms.factor_dtype != "I8":
        return Factors(b, a)
    b_scale = fetch(MODEL, f"{info.name}.factor_b_scale")
    return Factors(b, a, b_scale, fetch(MODEL, f"{info.name}.factor_a_scale"))
