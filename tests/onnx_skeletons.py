"""Tiny models captured as skeletons, and skeletons made runnable: their weights decoded, dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from compress.checkpoint import Checkpoint, skeleton


def dense(model: Any, checkpoint: Checkpoint) -> Any:
    """The model that a skeleton stands for, in standard operators and float32."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for name, tensor in skeleton.weights_of(made).items():
        values = checkpoint.read(checkpoint.info(name)).astype(np.float32)
        assert list(values.shape) == list(tensor.dims)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
    nodes = [new for node in made.graph.node for new in _lowered(node)]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    del made.opset_import[1:]
    return made


def _lowered(node: Any) -> list[Any]:
    if node.domain != skeleton.DOMAIN:
        return [node]
    assert node.op_type == skeleton.LINEAR
    x, weight, *bias = node.input
    result = node.output[0]
    nodes = []
    if not any(a.name == "transposed" and a.i for a in node.attribute):
        nodes.append(helper.make_node("Transpose", [weight], [f"{result}.w"], perm=[1, 0]))
        weight = f"{result}.w"
    product = f"{result}.xw" if bias else result
    nodes.append(helper.make_node("MatMul", [x, weight], [product]))
    if bias:
        nodes.append(helper.make_node("Add", [product, *bias], [result]))
    return nodes


def session(model: Any) -> Any:
    """onnxruntime on one thread, with the checker's word that the model is valid."""
    import onnxruntime

    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


_TEXT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32, "initializer_range": 0.4,
}  # fmt: skip


def _llama() -> Any:
    """Rows that groups of 32 divide: outputs of it are exported, too."""
    import transformers

    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{**_TEXT, **sizes, "initializer_range": 0.1},
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def _gpt2() -> Any:
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=1, n_head=4, n_positions=32, initializer_range=0.4
        )
    )


def _bert() -> Any:
    import transformers

    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**_TEXT, num_labels=3)
    )


def _resnet() -> Any:
    import transformers

    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=5, layer_type="basic"
        )
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": _llama, "gpt2": _gpt2, "bert": _bert, "resnet": _resnet,
}  # fmt: skip


@dataclass
class Tried:
    """A saved model, how transformers runs it, its skeleton, and the skeleton made runnable."""

    path: Path
    reference: Any
    captured: Any  # compress.export_onnx.capture.Captured
    session: Any = field(repr=False)

    def run(self, **arrays: Any) -> dict[str, Any]:
        names = {one.name for one in self.captured.inputs}
        feed = {name: array for name, array in arrays.items() if name in names}
        return dict(zip(self.captured.outputs, self.session.run(None, feed), strict=True))

    def expected(self, **arrays: Any) -> Any:
        import torch

        with torch.no_grad():
            return self.reference(**{n: torch.from_numpy(a) for n, a in arrays.items()})

    def empty_cache(self, batch: int) -> dict[str, Any]:
        return {
            one.name: np.zeros([batch, one.axes[1], 0, one.axes[3]], np.float32)
            for one in self.captured.inputs
            if one.name.startswith("past")
        }


def try_out(name: str, path: Path) -> Tried:
    """A model of MAKERS, saved to `path` and captured."""
    import torch

    from compress.export_onnx.capture import capture
    from compress.output import open_any

    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)  # statistics of batches that were seen
    model.save_pretrained(path)
    with open_any(path) as checkpoint:
        captured = capture(checkpoint)
        made = session(dense(captured.model, checkpoint))
    return Tried(path, model, captured, made)
