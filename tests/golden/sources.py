"""The small checkpoints that golden outputs were made from, and what was done to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from golden.reading import header_of
from toolbox import write_safetensors

Arrays = dict[str, np.ndarray]
SHARD = 4_000  # bytes: cuts the small model in several files


@dataclass(frozen=True)
class Golden:
    """One folder: its name, the checkpoint, and the run.

    passes  as in a recipe
    output  the recipe's block of that name
    shard   largest weight file, bytes
    """

    name: str
    source: Callable[[Path], Path]
    passes: tuple[Mapping[str, Any], ...]
    output: Mapping[str, Any] = field(default_factory=dict)
    shard: int = 5 * 10**9


def _normal(seed: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray((drawn * 0.05).astype(dtype))


def _checkpoint(folder: Path, tensors: Arrays, **config: Any) -> Path:
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def widths(folder: Path) -> Path:
    """A matrix for each width and symmetry, named after them; columns that groups do not divide."""
    tensors = {
        f"{kind}.{bits}.dense.weight": _normal(bits, 3, 20)
        for kind in ("symmetric", "asymmetric")
        for bits in range(2, 9)
    }
    tensors |= {
        "bf16.dense.weight": _normal(20, 3, 20, dtype=ml_dtypes.bfloat16),
        "fp16.dense.weight": _normal(21, 3, 20, dtype=np.float16),
        "double.dense.weight": _normal(22, 3, 20, dtype=np.float64),
        "tensor.dense.weight": _normal(23, 3, 20),
        "offset.dense.weight": _normal(24, 3, 20) + np.float32(0.1),
        "dense.bias": _normal(25, 3),
        "steps": np.arange(3),
    }
    return _checkpoint(folder, tensors)


def roles(folder: Path) -> Path:
    """A tensor of every role that has a matrix of its own: conv, conv1d, experts, embedding."""
    tensors = {
        "conv1.weight": _normal(0, 4, 2, 3, 3),
        "h.0.attn.c_attn.weight": _normal(1, 8, 24),
        "h.0.attn.c_attn.bias": _normal(2, 24),
        "experts.gate_up_proj": _normal(3, 2, 24, 8),
        "experts.down_proj": _normal(4, 2, 8, 12),
        "fc1.weight": _normal(5, 10, 16, dtype=ml_dtypes.bfloat16),
        "fc2.weight": _normal(6, 10, 16),
        "wte.weight": _normal(7, 12, 8),
        "ln_f.weight": np.ones(8, np.float32),
    }
    return _checkpoint(folder, tensors, model_type="gpt2", hidden_size=8, num_experts=2)


def values(folder: Path) -> Path:
    """Matrices to prune, in a file whose metadata are not those of PyTorch."""
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    tensors = {
        "few.dense.weight": _normal(0, 10, 16, dtype=np.float16),
        "many.dense.weight": _normal(1, 10, 16),
        "dense.bias": _normal(2, 10),
    }
    write_safetensors(path, tensors)
    header, data = header_of(path)
    header["__metadata__"] = {"format": "mlx", "modelspec.title": "golden"}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def llama(folder: Path, *, wide: int = 32, dtype: Any = np.float32, head: bool = False) -> Path:
    """A decoder of one layer that transformers builds, its head tied to the embedding or not."""
    tokens, layer = 24, "model.layers.0"
    linear = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    norms = [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"]
    matrices = {"model.embed_tokens": tokens} | {f"{layer}.{name}": wide for name in linear}
    matrices |= {"lm_head": tokens} if head else {}
    tensors = {
        f"{name}.weight": _normal(seed, rows, wide, dtype=dtype)
        for seed, (name, rows) in enumerate(matrices.items())
    }
    tensors |= {f"{name}.weight": np.ones(wide, dtype) for name in norms}
    return _checkpoint(
        folder, tensors, architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=wide,
        intermediate_size=wide, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=tokens, max_position_embeddings=64, rms_norm_eps=1e-5, hidden_act="silu",
        tie_word_embeddings=not head, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def llama_bf16(folder: Path) -> Path:
    """The same in bfloat16."""
    return llama(folder, dtype=ml_dtypes.bfloat16)


def llama_with_head(folder: Path) -> Path:
    """The same with a head of its own: codes of the embedding fit in every format."""
    return llama(folder, head=True)


def narrow_llama(folder: Path) -> Path:
    """Eight channels, to be calibrated."""
    return llama(folder, wide=8)


def torch_file(folder: Path) -> Path:
    """A PyTorch file in which two names share their values."""
    import torch

    table = torch.from_numpy(_normal(0, 12, 16))
    tensors = {
        "embed.weight": table,
        "fc.weight": torch.from_numpy(_normal(1, 8, 16)),
        "fc.bias": torch.from_numpy(_normal(2, 8)),
        "lm_head.weight": table,
    }
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "model.pt")
    return folder / "model.pt"


def graph(folder: Path) -> Path:
    """An .onnx file: a convolution and two products, one with its weight in a file beside it."""
    import onnx

    helper = onnx.helper
    weights = {
        "conv": _normal(0, 4, 2, 3, 3),
        "first": _normal(1, 64, 24),
        "second": _normal(2, 24, 8),
        "shape": np.array([-1, 64]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "shape"], ["f"]),
        helper.make_node("MatMul", ["f", "first"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "second"], ["y"]),
    ]
    value, kind = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    made = helper.make_graph(
        nodes, "g", [value("x", kind, ["n", 2, 4, 4])], [value("y", kind, ["n", 8])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=5000)
    return path


def _quantize(**options: Any) -> dict[str, Any]:
    return {"quantize": {"group": 16, "on_indivisible": "short", **options}}


def _width_of(name: str, bits: int, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    return {"targets": f"{name}.dense.weight", "bits": bits, "symmetric": symmetric, **more}


# Overrides of one pass, so that every matrix of `widths` has codes of its own kind.
_WIDTHS = _quantize(
    targets=["*.dense.weight"],
    overrides=[
        *(_width_of(f"symmetric.{bits}", bits) for bits in range(2, 9)),
        *(_width_of(f"asymmetric.{bits}", bits, False) for bits in range(2, 9)),
        _width_of("bf16", 5, scale_dtype="bf16"),
        _width_of("fp16", 4, False, search="none"),
        _width_of("double", 8, scale_dtype="fp32", group=-1),
        _width_of("tensor", 3, group=0),
        _width_of("offset", 6, False, group=0),
    ],
)
_MATRICES = ["conv1", "*c_attn", "experts*", "fc*"]

# The last digit of a name is the version that the folder keeps readable.
GOLDENS = (
    Golden("native-widths-1", widths, (_WIDTHS,), {"format": "native"}),
    Golden(
        "native-sparse-1",
        roles,
        (
            {"prune": {"sparsity": 0.6, "scope": "tensor"}},
            _quantize(bits=4, group=-1, targets=["conv1", "experts*", "fc2"]),
        ),
        {"format": "native"},
    ),
    Golden(
        "native-values-1",
        values,
        (
            {"prune": {"sparsity": 0.01, "scope": "tensor", "targets": ["few*"]}},
            {"prune": {"sparsity": 0.3, "scope": "tensor", "targets": ["many*"]}},
            _quantize(bits=7, symmetric=False, targets=["many*"]),
        ),
        {"format": "native"},
    ),
    Golden(
        "native-dense-codes-and-factors-1",
        roles,
        (
            {
                "super-weights": {
                    "method": "named",
                    "published": False,
                    "coordinates": ["fc1.weight:3:5", "fc1.weight:0:15", "fc2.weight:9:0"],
                }
            },
            {"prune": {"sparsity": 0.1, "scope": "tensor", "targets": ["fc2"]}},
            _quantize(bits=3, targets=[*_MATRICES, "wte"]),
            {"low-rank": {"rank": 2, "targets": ["conv1", "*c_attn", "experts.down_proj"]}},
        ),
        {"format": "native"},
    ),
    Golden(
        "native-int8-factors-1",
        roles,
        (
            _quantize(bits=2, symmetric=False),
            {"low-rank": {"rank": 2, "factor_dtype": "int8"}},
        ),
        {"format": "native"},
    ),
    Golden(
        "native-sharded-1",
        llama,
        (_quantize(bits=5, targets=["*_proj", "*embed_tokens"]),),
        {"format": "native", "untouched": "bf16"},
        SHARD,
    ),
    Golden("native-torch-file-1", torch_file, (_quantize(bits=6, group=8),), {"format": "native"}),
    Golden(
        "compressed-tensors-1",
        llama_with_head,
        (
            _quantize(
                bits=4,
                targets=["*_proj", "*embed_tokens"],
                overrides=[
                    {"targets": "*embed_tokens", "bits": 8, "group": -1},
                    {"targets": "*down_proj", "bits": 8, "group": -1},
                    {"targets": "*o_proj", "bits": 2, "group": 32},
                ],
            ),
        ),
        {"format": "compressed-tensors"},
    ),
    Golden(
        "compressed-tensors-adapter-1",
        llama_bf16,
        (
            {
                "super-weights": {
                    "method": "named",
                    "published": False,
                    "coordinates": ["0:3:5", "0:7:5", "0:1:30"],
                }
            },
            {"prune": {"sparsity": 0.4}},
            _quantize(bits=4),
            {"low-rank": {"rank": 2, "targets": ["*o_proj", "*down_proj"]}},
        ),
        {"format": "compressed-tensors"},
    ),
    Golden(
        "onnx-1",
        widths,
        (_WIDTHS,),
        {"format": "onnx"},
    ),
    Golden(
        "onnx-graph-1",
        graph,
        (
            _quantize(
                bits=8,
                group=-1,
                overrides=[{"targets": "first", "bits": 4, "group": 16, "symmetric": False}],
            ),
            {"low-rank": {"rank": 2, "targets": ["second"]}},
        ),
        {"format": "onnx", "onnx": True},
    ),
    Golden("native-graph-1", graph, (_quantize(bits=3),), {"format": "native", "onnx": True}),
    Golden("dense-1", llama, ({"prune": {"sparsity": 0.5}},), {"format": "dense"}),
)
