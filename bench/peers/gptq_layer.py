"""llm-compressor's own GPTQ of one matrix: seconds and the error that it leaves.

    python bench/peers/gptq_layer.py [--side 4096] [--rounds 3] [--threads 0] [--json FILE]

The matrix, the Hessian and the settings are those of bench/obs.py (its `problem`, by the same
seeds; numpy's generators draw the same in every environment): 4 bits, groups of 128, symmetric,
damping 0.01, blocks of 128. Timed is `quantize_weight`, the function that GPTQModifier calls; the
scales are made before, outside of that time (`scale seconds`). Every round gets fresh copies, since
it destroys what it is given. The error is tr(dW H dW^T) / tr(W H W^T). Runs inside llm-compressor's
environment.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import figures
import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer

BITS, GROUP, BLOCK, DAMPING = 4, 128, 128, 0.01


def problem(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and Hessian, as in bench/obs.py: rank-deficient inputs with noise."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((side, side), dtype=np.float32) * np.float32(0.02)
    rank = max(1, side // 4)
    inputs = rng.standard_normal((2 * side, rank), dtype=np.float32)
    inputs = inputs @ rng.standard_normal((rank, side), dtype=np.float32) / np.sqrt(rank)
    inputs += 0.3 * rng.standard_normal(inputs.shape, dtype=np.float32)
    hessian = inputs.T @ inputs / len(inputs)
    return weights, hessian.astype(np.float32)


def relative_error(weights: np.ndarray, decoded: np.ndarray, hessian: np.ndarray) -> float:
    def weighed(matrix: np.ndarray) -> float:
        return float(np.vdot((matrix @ hessian).astype(np.float64), matrix.astype(np.float64)))

    return weighed(weights - decoded) / weighed(weights)


def measured(
    weights: np.ndarray, hessian: np.ndarray, observer: str, actorder: str | None, rounds: int
) -> dict[str, object]:
    """Median seconds and the error of one setting."""
    arguments = QuantizationArgs(
        num_bits=BITS,
        symmetric=True,
        strategy="group",
        group_size=GROUP,
        actorder=actorder,
        observer=observer,
        scale_dtype=torch.float16,
    )
    watch = Observer.load_from_registry(observer, base_name="weight", args=arguments)
    begun = time.perf_counter()
    scales = watch(torch.from_numpy(weights)).get_qparams()
    scale_seconds = time.perf_counter() - begun
    wall, processor = [], []
    for _ in range(rounds):
        given = torch.from_numpy(weights.copy())[None], torch.from_numpy(hessian.copy())[None]
        begun, used = time.perf_counter(), time.process_time()
        with torch.no_grad():
            decoded, _, fallback = quantize_weight(
                *given,
                scale=scales["scale"][None],
                zero_point=scales["zero_point"][None],
                global_scale=None,
                quant_args=arguments,
                blocksize=BLOCK,
                percdamp=DAMPING,
            )
        wall.append(time.perf_counter() - begun)
        processor.append(time.process_time() - used)
    if fallback.any():
        raise SystemExit("the Hessian could not be factored: this was rounding, not GPTQ")
    return {
        "candidate": f"llm-compressor GPTQ, {observer}, actorder {actorder}",
        "seconds": statistics.median(wall),
        "processor seconds": statistics.median(processor),
        "scale seconds": scale_seconds,
        "error": relative_error(weights, decoded[0].numpy(), hessian),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0 leaves its own")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    weights, hessian = problem(options.side)
    rows = [
        measured(weights, hessian, observer, actorder, options.rounds)
        for observer, actorder in (
            ("memoryless_minmax", None),
            ("memoryless_minmax", "static"),
            ("memoryless_mse", "static"),
        )
    ]
    found = {
        "side": options.side,
        "threads": torch.get_num_threads(),
        "versions": figures.versions("llmcompressor", "compressed-tensors", "torch"),
        "rows": rows,
    }
    for row in rows:
        print(row)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
