"""What tests of the whole tool share: running it as a user does, and making small checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from forked_cli import forked

TAGS = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "F64",
    np.dtype(np.int64): "I64",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}


def tool(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `compress ARGUMENTS` in a process of its own; no terminal, no network.

    The process is a fork of one that has imported everything; COMPRESS_TEST_PROCESSES=1 starts an
    interpreter for each, as `tool_process` does.
    """
    if sys.platform != "linux" or os.environ.get("COMPRESS_TEST_PROCESSES") == "1":
        return tool_process(*arguments, cwd=cwd)
    return forked([str(word) for word in arguments], cwd=cwd)


def tool_process(
    *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`tool` in an interpreter of its own: for times, peaks of memory and the environment."""
    return subprocess.run(
        [sys.executable, "-m", "compress", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def tool_json(*arguments: str | Path) -> Any:
    """The JSON that `compress ... --json` prints; the command must succeed."""
    done = tool(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def produce(model: Path, out: Path, *words: str) -> Path:
    """`compress run MODEL -o OUT WORDS`, and OUT."""
    tool_json("run", model, "-o", out, *words)
    return out


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A plain safetensors file, independent of the writer under test."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, blobs = 0, []
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": TAGS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
        blobs.append(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def tiny_llama(
    folder: Path,
    *,
    hidden: int = 64,
    ffn: int = 128,
    layers: int = 2,
    vocabulary: int = 96,
    dtype: Any = np.float32,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """A checkpoint with Llama's names and shapes and random weights, in one file or in shards."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.05).astype(dtype)

    tensors = {"model.embed_tokens.weight": weight(vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for part in ("q", "k", "v", "o"):
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = weight(hidden, hidden)
        tensors[f"{prefix}mlp.gate_proj.weight"] = weight(ffn, hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = weight(ffn, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = weight(hidden, ffn)
        tensors[f"{prefix}input_layernorm.weight"] = np.ones(hidden, dtype)
        tensors[f"{prefix}post_attention_layernorm.weight"] = np.ones(hidden, dtype)
    tensors["model.norm.weight"] = np.ones(hidden, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text("{}")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    weight_map = {}
    for k in range(shards):
        name = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        own = names[k::shards]
        write_safetensors(folder / name, {n: tensors[n] for n in own})
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tree(folder: Path, *, without_run: bool = True) -> dict[str, str]:
    """File name -> SHA-256; `report.*` and the manifest's run block and digest left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = str(path.relative_to(folder))
        content = path.read_bytes()
        if without_run and name.startswith("report."):
            continue
        if without_run and name == "manifest.json":
            body = json.loads(content)
            body.pop("run"), body.pop("digest"), body["files"].pop("report.json", None)
            content = json.dumps(body, sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found
