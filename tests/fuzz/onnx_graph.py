"""ONNX graphs and the files that they name: read as a checkpoint, and as onnxruntime will run them.

The input is the .onnx file. Beside it lies `w.bin` of 64 bytes. What is read has its tensors inside
of their files, and its skeleton passes the checks of skeletons.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from compress.checkpoint import skeleton
from compress.checkpoint.files import open_inside
from compress.checkpoint.onnx_file import OnnxFile, check_onnx, parse, read_onnx
from compress.checkpoint.onnx_uses import weights_of_graph
from compress.checkpoint.skeleton_checks import check_skeleton
from compress.errors import InputError
from compress.tensor import DTYPES
from fuzz.checks import Folder, outcome, require
from fuzz.wire import mutate  # noqa: F401 - the driver takes it from here

NAME = "model.onnx"
LONGEST = 1024
WORDS = (
    b"location", b"offset", b"length", b"checksum", b"w.bin", b"../w.bin", b"./w.bin", b"sub/w.bin",
    b"model.onnx", b"*/_ORT_MEM_ADDR_/*", b"-1", b"16", b"18446744073709551615", b"MatMul", b"Gemm",
    b"Identity", b"Transpose", b"perm", b"transB", b"Conv", b"Gather", b"Constant", b"If",
    b"compress", b"Linear", b"com.microsoft", b"MatMulNBits", b"DequantizeLinear", b"w", b"x", b"y",
    b"__metadata__", b"weights", b"\x3a", b"\x2a", b"\x0a", b"\xff" * 9 + b"\x01",
)  # fmt: skip
_folder = Folder(NAME)
(Path(_folder.path) / "w.bin").write_bytes(bytes(range(64)))


def seeds(corpus: Path | None) -> Iterator[bytes]:
    """Products, a convolution, a table, a branch, every place of data; the corpus."""
    from fuzz.onnx_seeds import models

    for model in models():
        yield model.SerializeToString()
    for path in sorted(corpus.glob("onnx/*/model.onnx")) if corpus else ():
        if path.stat().st_size < 2000:
            yield path.read_bytes()


def target(data: bytes) -> None:
    """Read one graph as a checkpoint or as a graph to run; what is a checkpoint can be run."""
    _folder.fill(data)
    if zlib.crc32(data) & 1:
        _checked()
        return
    for quantized in (True, False):
        file = open_inside(_folder.path, NAME)
        try:
            found = outcome(
                lambda one=file, more=quantized: read_onnx(  # type: ignore[misc]
                    one, _folder.path, allow_quantized=more
                ),
                names=NAME, errors=(InputError,),
            )  # fmt: skip
        finally:
            file.close()
        if found is None:
            return
        try:
            _check(found)
        finally:
            found.close()
    require(_checked(), "a checkpoint is read of what cannot be run")


def _checked() -> bool:
    def check() -> bool:
        check_onnx(Path(_folder.file))
        return True

    return bool(outcome(check, names=NAME, errors=(InputError,)))


def _check(found: OnnxFile) -> None:
    names = [placed.info.name for placed in found.tensors]
    require(len(set(names)) == len(names), "two tensors with one name")
    for placed in found.tensors:
        info = placed.info
        size = DTYPES[info.dtype].itemsize
        for dimension in info.shape:
            size *= dimension
        require(size == info.nbytes, "a tensor of another size than its shape")
        end = placed.offset + info.nbytes
        require(placed.offset >= 0 and end <= placed.data.size, "a tensor outside of its file")
    require(set(found.external) <= {"w.bin"}, "a file that is not there")
    for text in found.warnings:
        require(text.isascii() and text.isprintable() and NAME in text, "a warning unfit to print")
    model = parse(found.graph, NAME)
    check_skeleton(model, NAME)
    weights = skeleton.weights_of(model)
    require(set(weights) <= set(names), "a weight that is no tensor")
    require(set(weights_of_graph(model)) >= set(weights), "a weight without a role")
