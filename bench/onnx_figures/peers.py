"""What onnxruntime's own tools make of the dense graph: half floats, and MatMulNBits."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from common import command

DATA = "weights.bin"


def dense(model: Path, folder: Path) -> Path:
    """The float32 graph of a checkpoint, its weights as plain initializers of MatMul."""
    import onnxruntime

    path = folder / "model.onnx"
    if path.exists():
        return path
    raw = folder.with_name(f"{folder.name}-raw")
    command("export", model, "--to", "onnx", "-o", raw, "--no-fsync", "--overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():  # what an evaluation needs beside the graph
        if file.is_file() and file.suffix in (".json", ".txt", ".model"):
            shutil.copy(file, folder / file.name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    key = "session.optimized_model_external_initializers_file_name"
    options.add_session_config_entry(key, DATA)
    onnxruntime.InferenceSession(
        str(raw / "model.onnx"), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=["MatMulAddFusion"],  # the quantizer knows MatMul, not Gemm
    )  # fmt: skip
    shutil.rmtree(raw)
    return path


def half(source: Path, folder: Path) -> Path:
    """The graph in float16; inputs and outputs stay as they are."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if (folder / source.name).exists():
        return folder / source.name
    model = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    return _saved(model, source, folder)


def nbits(
    source: Path, folder: Path, bits: int, block: int, level: int, *, symmetric: bool = True
) -> Path:
    """The graph as MatMulNBitsQuantizer makes it: rounding to nearest, float32 scales."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    if (folder / source.name).exists():
        return folder / source.name
    logging.disable(logging.WARNING)
    made = MatMulNBitsQuantizer(
        onnx.load(source), bits=bits, block_size=block, is_symmetric=symmetric,
        accuracy_level=level,
    )  # fmt: skip
    made.process()
    logging.disable(logging.NOTSET)
    return _saved(made.model.model, source, folder)


def _saved(model: Any, source: Path, folder: Path) -> Path:
    import onnx

    folder.mkdir(parents=True, exist_ok=True)
    for file in source.parent.iterdir():
        if file.name not in (source.name, DATA):
            shutil.copy(file, folder / file.name)
    path = folder / "model.onnx"
    (folder / DATA).unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=DATA)
    return path


def at_level(path: Path, level: int) -> Path:
    """A graph beside one of ours, with products of that accuracy level, on the same weights."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    made = path.with_name(f"level{level}.onnx")
    made.write_bytes(model.SerializeToString())
    return made


def product_bytes(path: Path) -> int:
    """Bytes of codes, scales and zero points of every MatMulNBits."""
    import onnx
    from onnx import helper

    model = onnx.load(path, load_external_data=False)
    tensors = {t.name: t for t in model.graph.initializer}
    makers = {n.output[0]: n for n in model.graph.node}
    total = 0
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        for name in node.input[1:4]:
            while name in makers and name not in tensors:
                name = makers[name].input[0]  # noqa: PLW2901
            if name not in tensors:
                continue
            tensor, size = tensors[name], 1
            for one in tensor.dims:
                size *= one
            total += size * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return total
