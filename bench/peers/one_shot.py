"""llm-compressor's `oneshot` on token ids, and the dequantized weights that it leaves.

Runs inside llm-compressor's environment. The model is loaded in fp32, so that the peer loses
nothing to bf16 arithmetic; its own `scale_dtype` rounds scales to fp16, which is what is counted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import figures
import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, forward_quantize
from llmcompressor import oneshot
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

SCALE_BITS = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every llm-compressor script takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("model", type=Path, help="a checkpoint's folder")
    made.add_argument("out", type=Path, help="gets dense.safetensors and figures.json")
    made.add_argument(
        "--ids", type=Path, required=True, help="token ids, int64 [sequences, length]"
    )
    made.add_argument("--sequences", type=int, default=0, help="the first N only; 0: all")
    made.add_argument("--batch", type=int, default=8, help="sequences a forward pass")
    made.add_argument("--bits", type=int, default=4)
    made.add_argument("--group", type=int, default=64, help="-1: a scale a row")
    made.add_argument("--asymmetric", action="store_true", help="zero points of `bits` bits")
    made.add_argument(
        "--observer",
        default="memoryless_minmax",
        help="how a group's range is chosen: memoryless_minmax, memoryless_mse, imatrix_mse",
    )
    made.add_argument("--dtype", choices=DTYPES, default="float32", help="of the loaded model")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--no-weights", action="store_true", help="figures.json only: for timings")
    return made


def scheme(options: argparse.Namespace) -> dict[str, QuantizationScheme]:
    """One group of settings for every Linear."""
    weights = QuantizationArgs(
        num_bits=options.bits,
        symmetric=not options.asymmetric,
        strategy="channel" if options.group <= 0 else "group",
        group_size=None if options.group <= 0 else options.group,
        observer=options.observer,
        scale_dtype=torch.float16,
    )
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def run(options: argparse.Namespace, recipe: list[Any], keep_zeros: bool = False) -> None:
    """Calibrate, quantize, and save what is left. `keep_zeros` counts bits as of a sparse store."""
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype])
    ids = torch.from_numpy(np.load(options.ids).astype(np.int64))
    ids = ids[: options.sequences] if options.sequences else ids
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    begun = time.time()
    batches = DataLoader(rows, batch_size=options.batch)
    oneshot(model=model, dataset=batches, recipe=recipe, processor=object())
    facts = {
        "seconds": time.time() - begun,
        "peak_rss": figures.peak_memory(),
        "sequences": list(ids.shape),
        "versions": figures.versions(
            "llmcompressor", "compressed-tensors", "torch", "transformers"
        ),
        "arguments": {k: str(v) for k, v in vars(options).items()},
    }
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    if sorted(layers) != sorted(figures.block_linears(figures.names(options.model))):
        raise SystemExit(f"quantized {len(layers)} matrices, which are not the block linears")
    if options.no_weights:
        figures.save(options.out, None, None, **facts)
        return
    weights = {name: decoded(module, options) for name, module in layers.items()}
    zero = options.bits if options.asymmetric else 0
    count = figures.sparse_bits if keep_zeros else figures.dense_bits
    per = (options.bits, options.group, SCALE_BITS, zero)
    total = sum(count(weight, *per) for weight in weights.values())
    weights.update(changed(model, options.model, weights))
    figures.save(options.out, weights, total, **facts)


def decoded(module: torch.nn.Module, options: argparse.Namespace) -> torch.Tensor:
    """The weights that the layer's forward multiplies by."""
    found = forward_quantize(
        module, module.weight.data, "weight", module.quantization_scheme.weights
    )
    if figures.levels(found, options.group) > 1 << options.bits:
        raise SystemExit(f"a group has more distinct values than {options.bits} bits tell apart")
    return found


def changed(model: torch.nn.Module, source: Path, taken: figures.Weights) -> figures.Weights:
    """Parameters besides the quantized ones that no longer equal the checkpoint's."""
    stored = figures.source_weights(source)
    return {
        name: value.data
        for name, value in model.named_parameters()
        if name in stored
        and name not in taken
        and not torch.equal(value.data, stored[name].to(value.dtype))
    }
