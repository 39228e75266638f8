"""What the peers' scripts share: block linears, honest bits per weight, and the two files of a run.

Runs inside a peer's environment: torch, numpy and safetensors, nothing of this project.
"""

from __future__ import annotations

import json
import platform
import re
import resource
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]
BLOCK_LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")


def dense_bits(shape: tuple[int, ...], bits: int, group: int, scale: float, zero: float) -> float:
    """Bits of one matrix: codes, and `scale` + `zero` bits a group of a row."""
    rows, columns = shape
    groups = 1 if group <= 0 else -(-columns // group)
    return rows * (columns * bits + groups * (scale + zero))


def sparse_bits(weights: torch.Tensor, bits: int, group: int, scale: float, zero: float) -> float:
    """The same stored sparse: a bitmask by rows of whole bytes, codes of the nonzeros only."""
    rows, columns = weights.shape
    codes = 8 * rows * -(-columns // 8) + int(torch.count_nonzero(weights)) * bits
    return codes + dense_bits((rows, columns), 0, group, scale, zero)


def levels(weights: torch.Tensor, group: int) -> int:
    """The most distinct values in any group of a row: what its codes must tell apart."""
    rows, columns = weights.shape
    width = columns if group <= 0 else group
    groups = weights.reshape(rows * columns // width, width).sort(dim=1).values
    return int((groups[:, 1:] != groups[:, :-1]).sum(dim=1).max()) + 1


def source_weights(model: Path) -> Weights:
    """Every tensor of a safetensors checkpoint, as stored."""
    found: Weights = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            found.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return found


def block_linears(names: Mapping[str, torch.Tensor]) -> list[str]:
    """The matrices that every method quantizes: not the embeddings, not the head."""
    return [name for name in names if BLOCK_LINEAR.search(name)]


def save(out: Path, weights: Weights, total_bits: float, seconds: float, **more: Any) -> None:
    """Write OUT/dense.safetensors (fp32) and OUT/figures.json.

    `weights` holds the dequantized block linears, and whatever else the method changed: AWQ moves
    scales into the norms. `total_bits` are of the block linears; `seconds` of the peer's own work,
    without imports and loading.
    """
    linears = block_linears(weights)
    count = sum(weights[name].numel() for name in linears)
    zeros = sum(weights[name].numel() - int(weights[name].count_nonzero()) for name in linears)
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: w.to(torch.float32).contiguous() for n, w in weights.items()}, out / "dense.safetensors"
    )
    figures = {
        "bits_per_weight": total_bits / count,
        "linears": len(linears),
        "weights": count,
        "zeros": zeros / count,
        "seconds": seconds,
        "peak_rss": peak_memory(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **more,
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


def peak_memory() -> int:
    """Bytes of the process's peak resident set.

    Linux's ru_maxrss starts from what the parent held when it forked; VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        kilobytes = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if kilobytes:
            return int(kilobytes[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}
