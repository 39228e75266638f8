"""Large products in pieces of rows, so that onnxruntime decodes a piece of a matrix at a time.

At accuracy level 0 it decodes a matrix of 2 or 8 bits whole at every call: a head of 128 thousand
words takes a gigabyte then. The codes of a range of rows are a range of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compress.export_onnx.builder import MICROSOFT

MOST = 1 << 24  # weights of a piece: 64 MB in float32
_STRAIGHT = 4  # bits that onnxruntime multiplies as they are


def in_pieces(model: Any, most: int = MOST) -> None:
    """Cut, in place, every MatMulNBits of more than `most` weights whose codes lie in a file."""
    graph = model.graph
    tensors = {t.name: t for t in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "MatMulNBits" and node.domain == MICROSOFT:
            sizes = {a.name: a.i for a in node.attribute}
            codes = tensors.get(node.input[1])
            outside = codes is not None and codes.data_location == codes.DataLocation.EXTERNAL
            step = max(1, most // sizes["K"])
            if outside and sizes.get("bits", _STRAIGHT) != _STRAIGHT and sizes["N"] > step:
                nodes += _pieces(graph, node, codes, sizes["N"], step)
                continue
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _pieces(graph: Any, node: Any, codes: Any, rows: int, step: int) -> Iterator[Any]:
    from onnx import helper

    outputs = []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        mark = f"{node.output[0]}/{start}"
        part = type(node)()
        part.CopyFrom(node)
        part.name, part.output[0] = mark, mark
        part.input[1] = _rows_of(graph, codes, start, stop, f"{mark}/codes")
        bounds = [
            _constant(graph, f"{mark}/{name}", value)
            for name, value in (("from", start), ("to", stop), ("along", 0))
        ]
        for place, name in enumerate(part.input):
            if place >= 2 and name:  # scales, zero points and bias are small: they are copied
                part.input[place] = f"{mark}/{place}"
                yield helper.make_node("Slice", [name, *bounds], [part.input[place]])
        for attribute in part.attribute:
            if attribute.name == "N":
                attribute.i = stop - start
        outputs.append(mark)
        yield part
    yield helper.make_node("Concat", outputs, [node.output[0]], axis=-1)


def _rows_of(graph: Any, codes: Any, start: int, stop: int, name: str) -> str:
    """An initializer of some rows of `codes`: the same file, another range."""
    place = {entry.key: entry.value for entry in codes.external_data}
    row = int(place["length"]) // codes.dims[0]
    made = graph.initializer.add()
    made.CopyFrom(codes)
    made.name, made.dims[0] = name, stop - start
    for entry in made.external_data:
        if entry.key == "offset":
            entry.value = str(int(place["offset"]) + start * row)
        elif entry.key == "length":
            entry.value = str((stop - start) * row)
    return name


def _constant(graph: Any, name: str, value: int) -> str:
    from onnx import TensorProto

    graph.initializer.add().CopyFrom(
        TensorProto(name=name, data_type=TensorProto.INT64, dims=[1], int64_data=[value])
    )
    return name
