"""Who makes and who reads each value of a graph, and which values are constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from compress.tensor import Array

Read = Callable[[Any], Array]  # the values of an initializer (TensorProto), wherever they lie


class GraphIndex:
    """A ModelProto's top-level graph by value.

    makers     value -> the node that makes it
    readers    value -> nodes that read it, once for each time
    held       values that must stay: outputs of the graph, and what graphs inside nodes read
    constants  initializers by name
    """

    def __init__(self, model: Any) -> None:
        graph = model.graph
        self.nodes = list(graph.node)
        self.constants = {t.name: t for t in graph.initializer}
        self.inputs = [one.name for one in graph.input if one.name not in self.constants]
        self.held = {one.name for one in graph.output}
        self.makers: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            self.makers |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            self.held |= set(_inner_reads(node))
        self.makers.pop("", None)
        self._taken = {*self.makers, *self.constants, *self.readers}

    def constant(self, name: str) -> tuple[Any, bool] | None:
        """(the initializer, whether a Cast to float32 is between) of a value that is constant."""
        cast = False
        while name not in self.constants:
            maker = self.maker(name)
            if is_op(maker, "Cast") and attributes(maker).get("to") == 1:
                cast = True
            elif not is_op(maker, "Identity"):
                return None
            name = maker.input[0]
        return self.constants[name], cast

    def maker(self, value: str) -> Any:
        """The node that makes a value, or None."""
        return self.makers.get(value)

    def only_reader(self, value: str) -> Any:
        """The one node that reads a value which nothing else needs, or None."""
        found = self.readers.get(value, [])
        return found[0] if len(found) == 1 and value not in self.held else None

    def free(self, name: str) -> str:
        """A name for a new value: this one, or it with a number where it is taken."""
        made, number = name, 0
        while made in self._taken:
            number += 1
            made = f"{name}_{number}"
        self._taken.add(made)
        return made


def is_op(node: Any, *kinds: str) -> bool:
    """Whether a node is one of these operators of ONNX itself."""
    return node is not None and node.op_type in kinds and node.domain in ("", "ai.onnx")


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes that are numbers, by name."""
    return {a.name: a.f if a.type == a.FLOAT else a.i for a in node.attribute}


def floats(read: Read, tensor: Any) -> Array:
    """An initializer's values as float32."""
    return np.asarray(read(tensor)).astype(np.float32)


def reader_of(folder: str) -> Read:
    """Reads initializers that are inline, or whose data lies in `folder`."""

    def read(tensor: Any) -> Array:
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(tensor, folder))

    return read


def without_unread(model: Any) -> None:
    """Remove, in place, nodes and initializers that nothing reads any more."""
    while True:
        index = GraphIndex(model)
        needed = {*index.readers, *index.held}
        kept = [n for n in index.nodes if not n.output or any(o in needed for o in n.output if o)]
        if len(kept) == len(index.nodes):
            break
        del model.graph.node[:]
        model.graph.node.extend(kept)
    tensors = [t for t in model.graph.initializer if t.name in needed]
    if len(tensors) < len(model.graph.initializer):
        del model.graph.initializer[:]
        model.graph.initializer.extend(tensors)


def _inner_reads(node: Any) -> Iterator[str]:
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            yield from (one.name for one in graph.output)
            for inner in graph.node:
                yield from inner.input
                yield from _inner_reads(inner)
