"""torch's exporter on a user's own module, whose weights are there and are not folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import InputError, show
from compress.export_onnx.torch_exporter import quiet, reason, require_exporter


def export(
    module: Any,
    arguments: Sequence[Any],
    where: str,
    *,
    dynamic_shapes: Sequence[Any],
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
) -> Any:
    """The onnx_ir.Model of a torch module, neither optimized nor folded: every parameter that is
    used is an initializer of its name in the module.

    where  what to call the module in messages
    Raises UsageError where a package is missing, InputError where torch cannot trace the module.
    """
    require_exporter()
    import torch

    try:
        with quiet():
            program = torch.onnx.export(
                module,
                tuple(arguments),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=tuple(dynamic_shapes),
                input_names=list(input_names),
                output_names=list(output_names),
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(
            f"{show(where)}: torch.onnx.export cannot make a graph of it: {reason(error)}",
            hint="torch.export has to trace its forward: no branches on values, no fixed batch",
        ) from error
    if program is None:
        raise InputError(f"{show(where)}: torch.onnx.export made nothing of it")
    return program.model


def optimize(model: Any, weights: Mapping[str, str]) -> None:
    """Fold what is constant, but nothing that a weight goes into, and call weights as stored.

    model    onnx_ir.Model, changed in place; weights become inputs of it that follow its own
    weights  name of an initializer -> what to call it; several may get one name
    A weight's shape is known and its values are not: so no BatchNormalization goes into a kernel,
    no transposed copy is made, and every weight stays a tensor of the checkpoint.
    """
    import onnxscript.optimizer

    graph = model.graph
    values = [(graph.initializers.pop(name), stored) for name, stored in weights.items()]
    for value, _ in values:
        value.const_value = None
        graph.inputs.append(value)
    with quiet():
        onnxscript.optimizer.optimize(model)
    taken = set(weights.values())
    made = [*graph.inputs[: -len(values) or None], *graph.initializers.values()]
    made += [value for node in graph.all_nodes() for value in node.outputs]
    names = {value.name for value in made} | taken
    for value in made:
        if value.name in taken:
            value.name = _free(value.name, names)
            names.add(value.name)
    for value, stored in values:
        value.name = stored


def _free(name: str, names: set[str]) -> str:
    number = 1
    while f"{name}_{number}" in names:
        number += 1
    return f"{name}_{number}"
