"""`graph.onnx` of an output: the skeleton of the .onnx file that it was made from."""

from __future__ import annotations

from compress.checkpoint import skeleton
from compress.checkpoint.files import open_inside
from compress.errors import InputError, show

MAX_BYTES = 512 << 20


def read_skeleton(directory: str) -> bytes:
    """The skeleton in an output's directory, serialized. Raises InputError.

    What an .onnx file is checked for is checked again: the file may come from a stranger.
    """
    from compress.checkpoint.onnx_checks import check_model
    from compress.checkpoint.onnx_file import parse

    file = open_inside(directory, skeleton.FILE)
    try:
        raw = file.read_all(MAX_BYTES)
    finally:
        file.close()
    model = parse(raw, show(skeleton.FILE))
    check_model(model, show(skeleton.FILE), is_skeleton=True)
    for tensor in model.graph.initializer:
        if tensor.data_location == 1 and not skeleton.is_weight(tensor):
            raise InputError(
                f"{skeleton.FILE}: tensor {show(tensor.name)}: its data is said to lie elsewhere",
                hint="the file was changed: see compress verify",
            )
    return raw
