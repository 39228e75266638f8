"""Building the graph of an export: initializers that point into files, nodes, names, what was used.

Nothing is read or written here. Arrays that ONNX needs in another form than the weight files have
are noted with their size and a function that makes them; compress/export_onnx/data_file.py writes
those into `model.onnx.data`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compress.export_onnx.stored import Stored, Weights
from compress.export_onnx.style import Style
from compress.tensor import Array

DATA_FILE = "model.onnx.data"
MICROSOFT = "com.microsoft"
FLOAT, UINT8, INT8, INT64, FLOAT16, BFLOAT16, UINT4, INT4 = 1, 2, 3, 7, 10, 16, 21, 22
_ALIGN, _PAGE = 64, 4096
_HALF_BYTE = (UINT4, INT4)


@dataclass(frozen=True)
class Copy:
    """An array of the data file: `make` gives its bytes when it is written."""

    name: str
    offset: int
    nbytes: int
    make: Callable[[], Array]


@dataclass
class Facts:
    """What an export is made of, for the report."""

    operators: Counter[str] = field(default_factory=Counter)
    shared: dict[Stored, None] = field(default_factory=dict)  # ranges of weight files in use
    dense: dict[str, str] = field(default_factory=dict)  # compressed, but dense in the graph: why
    notes: list[str] = field(default_factory=list)

    @property
    def shared_bytes(self) -> int:
        """Bytes of the weight files that the graph reads."""
        return sum(one.nbytes for one in self.shared)


class Builder:
    """The new initializers and nodes of a graph; `nodes` are in the order of execution."""

    def __init__(self, weights: Weights, style: Style, taken: set[str]) -> None:
        self.weights, self.style = weights, style
        self.initializers: list[Any] = []
        self.prelude: list[Any] = []  # nodes that work on weights alone
        self.copies: list[Copy] = []
        self.facts = Facts()
        self.data_bytes = 0
        self._taken = taken
        self._pointers: dict[tuple[Stored, int, tuple[int, ...]], str] = {}
        self._copied: dict[tuple[object, int, int], int] = {}  # -> offset in the data file
        self._constants: dict[tuple[str, bytes], str] = {}
        self._worked_out: dict[bytes, str] = {}  # a node of the prelude -> its output

    def unique(self, name: str) -> str:
        """The name, or with a number where the graph has it already."""
        found, number = name, 1
        while found in self._taken:
            number += 1
            found = f"{name}.{number}"
        self._taken.add(found)
        return found

    def pointer(self, stored: Stored, name: str, data_type: int, dims: Sequence[int]) -> str:
        """An initializer whose data is a range of a weight file; one a range, type and shape."""
        key = (stored, data_type, tuple(dims))
        if key not in self._pointers:
            if self.style.self_contained:
                self._pointers[key] = self.copied(
                    name, data_type, dims, lambda: self.weights.read(stored), stored
                )
            else:
                self._pointers[key] = self._external(
                    name, data_type, dims, stored.file, stored.offset, stored.nbytes
                )
                self.facts.shared[stored] = None
        return self._pointers[key]

    def named(self, stored: Stored, name: str, data_type: int, dims: Sequence[int]) -> str:
        """`pointer` under a name that the graph's nodes know; another where the range has one."""
        if (stored, data_type, tuple(dims)) not in self._pointers:
            self._taken.discard(name)
        return self.pointer(stored, name, data_type, dims)

    def copied(
        self, name: str, data_type: int, dims: Sequence[int], make: Callable[[], Array],
        source: object = None,
    ) -> str:  # fmt: skip
        """An initializer in the data file; `make` returns its bytes when they are wanted.

        source  what the bytes are made of, the name where it is None: what was asked for before,
                in whatever shape, is not written again
        """
        nbytes = array_bytes(data_type, dims)
        key = (name if source is None else source, data_type, nbytes)
        offset = self._copied.get(key)
        if offset is None:
            align = _PAGE if nbytes >= _PAGE else _ALIGN
            offset = self._copied[key] = -(-self.data_bytes // align) * align
            self.data_bytes = offset + nbytes
            self.copies.append(Copy(name, offset, nbytes, make))
        return self._external(name, data_type, dims, DATA_FILE, offset, nbytes)

    def constant(self, name: str, values: Any, data_type: type[Any] = np.int64) -> str:
        """A small initializer that lies in the graph; the same one for the same name and values."""
        from onnx import numpy_helper

        made = numpy_helper.from_array(np.array(values, data_type))
        key = (name, made.SerializeToString(deterministic=True))
        if key not in self._constants:
            made.name = self._constants[key] = self.unique(name)
            self.initializers.append(made)
        return self._constants[key]

    def node(
        self,
        nodes: list[Any],
        op_type: str,
        inputs: Sequence[str],
        output: str,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node of one output to `nodes`; returns the output's name.

        What works on weights alone is done once, however many nodes read the result.
        """
        from onnx import helper

        made = helper.make_node(op_type, list(inputs), [], domain=domain, **attributes)
        key = made.SerializeToString(deterministic=True) if nodes is self.prelude else b""
        if key in self._worked_out:
            return self._worked_out[key]
        unique = self.unique(output)
        made.name = unique
        made.output.append(unique)
        nodes.append(made)
        if key:
            self._worked_out[key] = unique
        return unique

    def cast(self, nodes: list[Any], value: str, have: int, want: int) -> str:
        """The value as another type, by a node that onnxruntime folds where it is constant."""
        if have == want:
            return value
        return self.node(nodes, "Cast", [value], f"{value}.cast", to=want)

    def _external(
        self, name: str, data_type: int, dims: Sequence[int], file: str, offset: int, nbytes: int
    ) -> str:
        from onnx import TensorProto

        unique = self.unique(name)
        made = TensorProto(
            name=unique,
            data_type=data_type,
            dims=dims,
            data_location=TensorProto.DataLocation.EXTERNAL,
        )
        for key, value in (("location", file), ("offset", offset), ("length", nbytes)):
            entry = made.external_data.add()
            entry.key, entry.value = key, str(value)
        self.initializers.append(made)
        return unique


def array_bytes(data_type: int, dims: Sequence[int]) -> int:
    """Bytes of an array of an ONNX type; integers of 4 bits lie two to a byte."""
    size = math.prod(dims)
    if data_type in _HALF_BYTE:
        return -(-size // 2)
    from onnx import helper

    return size * int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)
