"""HQQ: dequantized block linears and honest figures. Needs no data.

    python bench/peers/hqq_rtn.py MODEL OUT --bits 4 --group 128 [--axis 0] [--round-zero]

Scale and zero point are fp16, 32 bits a group; a rounded zero point of --round-zero counts as
`bits` bits, which is fewer than HQQ stores. 3-bit codes count as 3 bits: HQQ packs ten into 32.
Quantized meta-data is ignored by this release. Runs inside HQQ's environment (environments.py).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import figures
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def quantized(weight: torch.Tensor, options: argparse.Namespace) -> torch.Tensor:
    """What HQQ's layer decodes to, with its fp16 scale and zero point, in fp32."""
    config = BaseQuantizeConfig(nbits=options.bits, group_size=options.group, axis=options.axis)
    config["weight_quant_params"]["round_zero"] = options.round_zero
    layer = HQQLinear.from_weights(
        weight.float(), None, config, compute_dtype=torch.float16, device="cpu"
    )
    for key in ("scale", "zero"):
        layer.meta[key] = layer.meta[key].to(torch.float16).float()
    layer.meta["compute_dtype"] = torch.float32
    return layer.dequantize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--axis", type=int, choices=[0, 1], default=1)
    parser.add_argument("--round-zero", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = figures.source_weights(options.model)
    linears = figures.block_linears(source)
    begun = time.time()
    weights = {name: quantized(source[name], options) for name in linears}
    seconds = time.time() - begun
    zero = options.bits if options.round_zero else 16
    total = sum(
        w.numel() * options.bits + w.numel() // options.group * (16 + zero)
        for w in weights.values()
    )
    figures.save(
        options.out,
        weights,
        total,
        seconds=seconds,
        peak_rss=figures.peak_memory(),
        versions=figures.versions("hqq", "torch"),
        arguments={k: str(v) for k, v in vars(options).items()},
    )


if __name__ == "__main__":
    main()
