"""A skeleton: an ONNX graph whose weights are names of a checkpoint's tensors, without data.

Two front ends make one: the reader of .onnx files (compress/checkpoint/onnx_file.py) and the
capture of a torch model (compress/export_onnx/capture.py). One back end,
compress/export_onnx/lowering.py, puts operators in the place of the nodes that read compressed
weights, and makes every other weight point into the weight file. An output that was made from an
.onnx file keeps the skeleton of it as `graph.onnx`.

A weight is an initializer called as the tensor is, with the shape and the data type that the graph
wants, and with external data at the location `WEIGHTS`. What is small and no tensor of the
checkpoint stays in the graph as it is. A captured graph has one operator of its own, in the domain
`DOMAIN`, whose attribute `transposed` says that W is [in, out]:

    Linear(x [..., in], W [out, in], bias [out]?) -> [..., out]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

FILE = "graph.onnx"
WEIGHTS = "weights"  # the location of a weight in a skeleton
DOMAIN = "compress"
LINEAR = "Linear"
MAX_BYTES = (1 << 31) - 1  # of a protobuf message

# TensorProto.DataType -> safetensors tag, for types that both have
TAGS = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16",
    11: "F64", 12: "U32", 13: "U64", 16: "BF16",
}  # fmt: skip
TYPES = {tag: number for number, tag in TAGS.items()}
_EXTERNAL = 1  # TensorProto.DataLocation


def weight(name: str, data_type: int, shape: Sequence[int]) -> Any:
    """The initializer (TensorProto) that stands for a tensor of the checkpoint."""
    from onnx import TensorProto

    made = TensorProto(name=name, data_type=data_type, dims=shape)
    mark(made)
    return made


def mark(tensor: Any) -> None:
    """Turn an initializer into a weight: its data goes, its name, type and shape stay."""
    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data",
                  "uint64_data", "external_data"):  # fmt: skip
        tensor.ClearField(field)
    tensor.data_location = _EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", WEIGHTS


def is_weight(tensor: Any) -> bool:
    """Whether an initializer of a skeleton stands for a tensor of the checkpoint."""
    return tensor.data_location == _EXTERNAL and any(
        entry.key == "location" and entry.value == WEIGHTS for entry in tensor.external_data
    )


def weights_of(model: Any) -> dict[str, Any]:
    """The weights (TensorProto) of a skeleton by name."""
    return {t.name: t for t in model.graph.initializer if is_weight(t)}


def graphs_of(model: Any) -> Iterator[Any]:
    """The graph, the graphs inside its nodes, and the functions of a model."""
    pending = [model.graph, *model.functions]
    while pending:
        one = pending.pop()
        yield one
        for node in one.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def strip_metadata(model: Any) -> None:
    """Remove what exporters note beside the graph: stack traces and paths of their machine."""
    del model.metadata_props[:]
    model.doc_string = ""
    for graph in graphs_of(model):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            for attribute in node.attribute:
                attribute.doc_string = ""
        for kind in ("initializer", "value_info", "input", "output"):
            for one in getattr(graph, kind, ()):
                if hasattr(one, "doc_string") and not isinstance(one, str):
                    one.doc_string = ""
                    if hasattr(one, "metadata_props"):
                        del one.metadata_props[:]
