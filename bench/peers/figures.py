"""What the peers' scripts share: block linears, honest bits per weight, and the two files of a run.

Runs inside a peer's environment: torch, numpy and safetensors, nothing of this project.
"""

from __future__ import annotations

import json
import platform
import re
import resource
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]
BLOCK_LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")


def dense_bits(weights: torch.Tensor, bits: int, group: int, scale: float, zero: float) -> float:
    """Bits of one matrix: codes, and `scale` + `zero` bits a group of a row."""
    rows, columns = weights.shape
    groups = 1 if group <= 0 else -(-columns // group)
    return rows * (columns * bits + groups * (scale + zero))


def sparse_bits(weights: torch.Tensor, bits: int, group: int, scale: float, zero: float) -> float:
    """The same stored sparse: a bitmask by rows of whole bytes, codes of the nonzeros only."""
    rows, columns = weights.shape
    codes = 8 * rows * -(-columns // 8) + int(torch.count_nonzero(weights)) * bits
    return codes + dense_bits(weights, 0, group, scale, zero)


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


def names(model: Path) -> list[str]:
    """The names of a safetensors checkpoint's tensors."""
    found: list[str] = []
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            found += handle.keys()
    return found


def block_linears(names: Iterable[str]) -> list[str]:
    """The matrices that every method quantizes: not the embeddings, not the head."""
    return [name for name in names if BLOCK_LINEAR.search(name)]


def save(out: Path, weights: Weights | None, total_bits: float | None, **facts: Any) -> None:
    """Write OUT/dense.safetensors (fp32) and OUT/figures.json.

    `weights` holds the dequantized block linears, and whatever else the method changed: AWQ moves
    scales into the norms; None leaves that file away, for runs that only take the time.
    `total_bits` are of the block linears. `facts` go into figures.json as they are.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = {**facts, "threads": torch.get_num_threads(), "python": platform.python_version()}
    if weights is not None and total_bits is not None:
        linears = [weights[name] for name in block_linears(weights)]
        count = sum(weight.numel() for weight in linears)
        nonzero = sum(int(weight.count_nonzero()) for weight in linears)
        found |= {"bits_per_weight": total_bits / count, "linears": len(linears), "weights": count}
        found |= {"zeros": 1 - nonzero / count}
        dense = {name: weight.to(torch.float32).contiguous() for name, weight in weights.items()}
        save_file(dense, out / "dense.safetensors")
    (out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


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
