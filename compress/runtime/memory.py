"""What a model holds in memory, and what its files hold on the disk."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from compress.layout import PART_FILES


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared memory counted once."""
    sizes: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def packed_bytes(path: Path) -> int:
    """Bytes of the weight files in a directory: the model's and those of its other terms."""
    files = [*path.glob("*.safetensors"), *(path / name for name in PART_FILES.values())]
    return sum(file.stat().st_size for file in set(files) if file.is_file())
