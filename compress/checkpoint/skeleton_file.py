"""`graph.onnx` of an output: the skeleton of the .onnx file that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compress.checkpoint import skeleton
from compress.checkpoint.files import open_inside
from compress.errors import show
from compress.tensor import TensorInfo

MAX_BYTES = 512 << 20


def read_skeleton(directory: str) -> bytes:
    """The skeleton in an output's directory, serialized. Raises InputError.

    What an .onnx file is checked for is checked again: the file may come from a stranger.
    """
    from compress.checkpoint.onnx_file import parse
    from compress.checkpoint.skeleton_checks import check_skeleton

    file = open_inside(directory, skeleton.FILE)
    try:
        raw = file.read_all(MAX_BYTES)
    finally:
        file.close()
    check_skeleton(parse(raw, show(skeleton.FILE)), show(skeleton.FILE))
    return raw


def roles_in_graph(infos: Sequence[TensorInfo], raw: bytes) -> list[TensorInfo]:
    """The tensors with the roles that the nodes of a serialized skeleton give them."""
    from compress.checkpoint.onnx_file import parse
    from compress.checkpoint.onnx_uses import weights_of_graph

    known = weights_of_graph(parse(raw, show(skeleton.FILE)))
    return [replace(i, role=known[i.name].role) if i.name in known else i for i in infos]
