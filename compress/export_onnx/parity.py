"""The proof of an export: onnxruntime runs the graph against our own decode, on the same inputs.

Two figures: of the graph as it is, whose products may round activations to 8 bits, and of the same
graph with exact products, which shows whether weights and operators are right.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.checkpoint import Checkpoint, skeleton
from compress.checkpoint.onnx_direct import in_standard_operators
from compress.checkpoint.skeleton import TAGS
from compress.errors import InputError, show
from compress.export_onnx.pieces import in_pieces
from compress.tensor import DTYPES, Array

if TYPE_CHECKING:
    from compress.evaluate.onnx_outputs import Onnx

EXACT = 1e-3  # relative error that exact products stay under: float32 sums in another order
ROUNDED = 0.25  # of graphs that round activations, on inputs made up at random
_SEED = 20260101
_BATCH = 2
_LENGTHS = (12, 64, 224)  # short as a sentence, then as a small and a usual image
_CHUNK = 1 << 20
_MOST = 1 << 28  # random numbers of all inputs together
Feed = Mapping[str, Array]


@dataclass(frozen=True)
class Parity:
    """How far outputs of the graph are from our decode's, over all inputs together.

    relative_error        root of (sum of squared differences / sum of squares), the graph as it is
    exact_relative_error  the same with exact products
    cosine                of the outputs as one vector, the graph as it is
    """

    relative_error: float
    exact_relative_error: float
    cosine: float
    samples: int
    inputs: str

    def record(self) -> dict[str, Any]:
        """For the report (JSON types)."""
        return {
            "relative_error": self.relative_error,
            "exact_relative_error": self.exact_relative_error,
            "cosine": self.cosine,
            "samples": self.samples,
            "inputs": self.inputs,
        }

    def failure(self, tolerance: float | None, *, exact: bool) -> str | None:
        """What is wrong, in one line; `exact` says that the graph rounds no activations."""
        if not self.exact_relative_error <= EXACT:
            return (
                f"with exact products the graph is {self.exact_relative_error:.3g} away from our"
                f" decode, more than {EXACT:g}: it would compute something else"
            )
        limit = tolerance if tolerance is not None else EXACT if exact else ROUNDED
        if not self.relative_error <= limit:
            return (
                f"the graph is {self.relative_error:.3g} away from our decode, more than {limit:g}"
            )
        return None


def compare(
    graph: Path,
    exact: bytes | None,
    feeds: Callable[[Onnx], Sequence[Feed]],
    reference: Iterable[Mapping[str, Array]],
    inputs: str,
) -> Parity:
    """Run the graph and its exact twin on every feed, and hold them to the reference's outputs.

    exact      the graph with exact products, its data in the graph's folder; None: it has them
    feeds      what a session of the graph is fed with
    reference  outputs by name for each feed, in order; the names that both have are compared
    The three run one after the other, so that the weights of one are in memory at a time.
    """
    from compress.evaluate.onnx_outputs import Onnx

    wanted = list(reference)
    runner = Onnx(graph, called=graph.name)
    given = feeds(runner)
    sums = [_sums_of(runner, given, wanted, graph.name)]
    del runner
    if exact is not None:
        twin = Onnx(graph, exact, exact=True, called=graph.name)
        sums.append(_sums_of(twin, given, wanted, graph.name))
    error, norm = np.sqrt([s[0] for s in sums]), np.sqrt([s[3] for s in sums])
    relative = np.where(error == 0, 0.0, error / np.maximum(norm, np.finfo(float).tiny))
    cosine = sums[0][1] / max(np.sqrt(sums[0][2] * sums[0][3]), np.finfo(float).tiny)
    return Parity(
        float(relative[0]), float(relative[-1]), float(min(1.0, cosine)), len(given), inputs
    )


def _sums_of(
    runner: Onnx, feeds: Sequence[Feed], wanted: Sequence[Mapping[str, Array]], where: str
) -> Array:
    sums = np.zeros(4)  # of squared differences, of products, of the squares of both
    for feed, outputs in zip(feeds, wanted, strict=True):
        names = [name for name in outputs if name in runner.outputs]
        if not names:
            raise InputError(f"{show(where)}: none of its outputs is known to our decode")
        for name, got in zip(names, runner.outputs_of(feed, names), strict=True):
            sums += _sums(name, got, outputs[name])
    return sums


def exact_twin(model: Any) -> bytes | None:
    """The graph with exact products, None where it has no others.

    onnxruntime makes products that round of DequantizeLinear and MatMul, too, unless told not to.
    """
    from onnx import ModelProto

    twin = ModelProto()
    twin.CopyFrom(model)
    rounds = False
    for node in twin.graph.node:
        rounds |= node.op_type == "DequantizeLinear"
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level" and attribute.i:
                    attribute.i, rounds = 0, True
    if not rounds:
        return None
    in_pieces(twin)
    return bytes(twin.SerializeToString())


def made_up_feeds(runner: Onnx, where: str, ids_below: int, names: Sequence[str]) -> list[Feed]:
    """One feed of random numbers for a graph whose inputs are not known by name.

    where      the file of the graph, safe to print
    ids_below  the smallest table that ids may be looked up in
    names      the outputs that it has to give
    Axes of any size get the first of `_LENGTHS` that the graph runs on. Raises InputError where it
    runs on none, for an input type that no numbers can be made up for, and for inputs of more than
    `_MOST` numbers.
    """
    why = ""
    for length in _LENGTHS:
        try:
            require_moderate(runner, where, length)
            feed = _made_up(runner, ids_below, length)
            runner.outputs_of(feed, names)
        except InputError as error:
            why = why or error.message
        else:
            return [feed]
    raise InputError(
        f"{why} (inputs made up at random, for the proof)",
        hint="give inputs that fit: --images FILE.npz or --ids FILE.npy",
    )


def _made_up(runner: Onnx, ids_below: int, length: int) -> Feed:
    """Random numbers for every input; ids are below the smallest table, masks are ones."""
    rng = np.random.default_rng(_SEED)
    feed: dict[str, Array] = {}
    for name, spec in runner.inputs.items():
        shape = _shape(spec, length)
        kind = np.dtype(runner.dtype_of(spec))
        if kind == np.bool_ or "mask" in name:
            feed[name] = np.ones(shape, kind)
        elif kind.kind in "iu":
            feed[name] = rng.integers(0, max(1, ids_below), shape).astype(kind)
        else:
            feed[name] = rng.standard_normal(shape).astype(kind)
    return feed


def require_moderate(runner: Onnx, where: str, length: int = 1) -> None:
    """Raises InputError for a graph whose inputs would be more than `_MOST` numbers.

    where   the file of the graph, safe to print
    length  of axes of any size behind the first one
    """
    total = 0
    for name, spec in runner.inputs.items():
        shape = _shape(spec, length)
        total += math.prod(shape)
        if total > _MOST:
            raise InputError(
                f"{where}: its inputs, {show(name)} {shape} among them, are more than {_MOST:,}"
                " numbers, which the proof would have to make up",
                hint="export the model with smaller inputs, or with axes of any size",
            )


def _shape(spec: Any, length: int) -> list[int]:
    """The shape of an input with its open axes closed."""
    free = [length if axis else _BATCH for axis in range(len(spec.shape))]
    return [n if isinstance(n, int) and n >= 0 else free[a] for a, n in enumerate(spec.shape)]


def reference_graph(graph: Any, checkpoint: Checkpoint, folder: Path) -> Path:
    """Write a skeleton with decoded weights into `folder`: what the source's own graph computes."""
    from onnx import ModelProto

    model = ModelProto()
    model.CopyFrom(graph)
    in_standard_operators(model)
    folder.mkdir(parents=True, exist_ok=True)
    offset = 0
    with open(folder / "weights.bin", "wb") as file:
        for name, tensor in skeleton.weights_of(model).items():
            info = checkpoint.info(name)
            values = checkpoint.read(info)
            wanted = DTYPES[TAGS[tensor.data_type]]  # others were refused with the graph
            data = np.ascontiguousarray(values.astype(wanted, copy=False))
            file.write(data.reshape(-1).view(np.uint8).data)
            del tensor.external_data[:]
            for key, value in (
                ("location", "weights.bin"),
                ("offset", offset),
                ("length", data.nbytes),
            ):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)
            offset += data.nbytes
    path = folder / "reference.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def smallest_table(graph: Any) -> int:
    """Rows of the smallest table that the graph gathers from."""
    sizes = {t.name: int(t.dims[0]) for t in graph.graph.initializer if len(t.dims) > 1}
    rows = [
        sizes[node.input[0]]
        for node in graph.graph.node
        if node.op_type == "Gather" and node.input[0] in sizes
    ]
    return min(rows, default=2)


def _sums(name: str, got: Array, wanted: Array) -> Array:
    if got.shape != wanted.shape:
        raise InputError(
            f"the output {show(name)} is {list(got.shape)}, our decode gives {list(wanted.shape)}"
        )
    found: Array = np.zeros(4)
    flat, other = got.reshape(-1), wanted.reshape(-1)
    for start in range(0, flat.size, _CHUNK):  # in float64 without a copy of all of them
        a, b = (v[start : start + _CHUNK].astype(np.float64) for v in (flat, other))
        difference = a - b
        found += [difference @ difference, a @ b, a @ a, b @ b]
    return found


def remove_folder(folder: Path) -> None:
    """Remove the folder of a reference graph."""
    for name in os.listdir(folder):
        os.unlink(folder / name)
    os.rmdir(folder)
