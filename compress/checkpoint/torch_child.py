"""Run as a script in a child process: turn a PyTorch file into safetensors, or say why not.

    python -I torch_child.py INPUT_FD OUTPUT_FD REPORT_FD INPUT_SIZE

Imports nothing of this package, so that an isolated interpreter finds it. The child is where a
hostile pickle does its worst, so it gives itself limits on memory, time and output before it
reads the first byte, takes plain dense tensors only, and ends without running destructors. The
report is one JSON object: {"aliases", "dropped", "root"} or {"refused", "tensor"}.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import warnings
from typing import Any

# Where training scripts put the state dict, in the order they are tried.
WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "net", "params_ema", "params", "ema",
    "ema_state_dict", "weights",
)  # fmt: skip
MAX_WRAPPERS = 3
MAX_RANK = 64
MAX_TENSORS = 200_000
MAX_NODES = 1_000_000
MAX_HEADER = 100_000_000
SLACK = 1 << 20  # bytes that an expanded view may take beyond its storage
CHUNK = 64 << 20


class Refused(Exception):
    """Why the file is not taken: a code of `torch_file.REASONS`, and the tensor's name."""

    def __init__(self, code: str, tensor: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.tensor = tensor


def limit_resources(size: int) -> None:
    """Cap memory, processor time and output at what an honest file of `size` bytes needs."""
    limits = [
        (resource.RLIMIT_CPU, 60 + size // 50_000_000),
        (resource.RLIMIT_FSIZE, 2 * size + MAX_HEADER),
        (resource.RLIMIT_CORE, 0),
    ]
    if os.path.exists("/proc/self/statm"):  # elsewhere the limit on memory is not enforced anyway
        with open("/proc/self/statm", encoding="ascii") as status:
            mapped = int(status.read().split()[0]) * resource.getpagesize()
        # Measured after importing torch, whose own mappings vary from 1 to 20 GB.
        limits.append((resource.RLIMIT_AS, mapped + 4 * size + (1 << 30)))
    for what, limit in limits:
        resource.setrlimit(what, (limit, limit))


def find_state_dict(loaded: Any) -> tuple[dict[Any, Any], str]:
    """The dict that holds tensors and the dotted path to it; wrappers are looked through."""
    import torch

    path: list[str] = []
    while isinstance(loaded, dict):
        if any(isinstance(value, torch.Tensor) for value in loaded.values()):
            return loaded, ".".join(path)
        inner = next((key for key in WRAPPERS if isinstance(loaded.get(key), dict)), None)
        if inner is None or len(path) == MAX_WRAPPERS:
            break
        path.append(inner)
        loaded = loaded[inner]
    raise Refused("no_state_dict")


def holds_tensor(value: Any) -> bool:
    """Whether a tensor hides anywhere in `value`; each object is looked at once."""
    import torch

    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            return True
        if id(item) in seen or not isinstance(item, dict | list | tuple | set):
            continue
        seen.add(id(item))
        if len(seen) > MAX_NODES:
            raise Refused("too_many")
        todo.extend(item.values() if isinstance(item, dict) else item)
    return False


def check_tensor(name: str, tensor: Any) -> None:
    """Take a dense CPU tensor that lies inside its storage, refuse everything else."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise Refused("kind", name)
    if tensor.is_quantized:
        raise Refused("quantized", name)
    if tensor.is_meta:
        raise Refused("meta", name)
    if tensor.layout != torch.strided or tensor.is_nested:
        raise Refused("layout", name)
    if tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg():
        raise Refused("kind", name)
    if tensor.dtype not in tags():
        raise Refused("dtype", name)
    if tensor.dim() > MAX_RANK:
        raise Refused("rank", name)
    if tensor.numel() == 0:
        return
    held = tensor.untyped_storage().nbytes()
    pairs = list(zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.storage_offset() < 0 or any(stride < 0 for _, stride in pairs):
        raise Refused("bounds", name)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in pairs)
    if (last + 1) * tensor.itemsize > held:
        raise Refused("bounds", name)
    if tensor.numel() * tensor.itemsize > max(held, SLACK):
        raise Refused("expanded", name)


def tags() -> dict[Any, str]:
    """torch dtype -> safetensors tag, as far as this torch knows them."""
    import torch

    names = {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
        "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
        "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "complex64": "C64",
        "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
        "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    }  # fmt: skip
    return {getattr(torch, name): tag for name, tag in names.items() if hasattr(torch, name)}


def select(state: dict[Any, Any]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """(tensors to write, alias -> kept name for ties, names of entries that are no tensors)."""
    import torch

    kept: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    dropped: list[str] = []
    views: dict[tuple[Any, ...], str] = {}
    if len(state) > MAX_TENSORS:
        raise Refused("too_many")
    for name, value in state.items():
        if not isinstance(name, str):
            raise Refused("keys")
        if name == "__metadata__":
            raise Refused("reserved", name)
        if not isinstance(value, torch.Tensor):
            if holds_tensor(value):
                raise Refused("nested", name)
            dropped.append(name)
            continue
        check_tensor(name, value)
        view = (
            value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape),
            value.stride(), value.dtype,
        )  # fmt: skip
        if value.numel() and view in views:
            aliases[name] = views[view]
        else:
            views[view] = name
            kept[name] = value
    return kept, aliases, dropped


def write(descriptor: int, tensors: dict[str, Any]) -> None:
    """A safetensors file with the tensors in their order; non-contiguous ones are copied."""
    import torch

    known, header, offset = tags(), {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": known[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise Refused("too_many")
    with open(descriptor, "wb", buffering=0, closefd=False) as out:
        write_all(out, memoryview(struct.pack("<Q", len(text)) + text))
        for tensor in tensors.values():
            if tensor.numel():
                flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                write_all(out, memoryview(flat.numpy()))


def write_all(out: Any, data: memoryview) -> None:
    """Write every byte: one call may take fewer than it is given."""
    done = 0
    while done < len(data):
        done += out.write(data[done : done + CHUNK])


def convert(source: int, target: int) -> dict[str, Any]:
    """Load `source` with the weights-only unpickler, write `target`, and return the report."""
    import torch

    try:
        with open(source, "rb", closefd=False) as file:
            file.seek(0)
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except MemoryError:
        raise Refused("memory") from None
    except Exception as error:  # whatever a hostile pickle provokes
        # torch's own text tells the user to switch the protection off: it stops here.
        if "allocate memory" in str(error)[:500]:
            raise Refused("memory") from None
        raise Refused("unpickling") from None
    state, root = find_state_dict(loaded)
    kept, aliases, dropped = select(state)
    if not kept:
        raise Refused("no_state_dict")
    write(target, kept)
    return {"aliases": aliases, "dropped": dropped, "root": root}


def main(arguments: list[str]) -> int:
    """Convert and report; the exit status is 0 whenever there is a report."""
    source, target, report_to, size = (int(argument) for argument in arguments)
    warnings.simplefilter("ignore")
    try:
        import torch

        torch.set_num_threads(1)
        torch.sparse.check_sparse_tensor_invariants.enable()  # type: ignore[no-untyped-call]
    except ImportError:
        report: dict[str, Any] = {"refused": "no_torch", "tensor": ""}
    else:
        limit_resources(size)
        try:
            report = convert(source, target)
        except Refused as refusal:
            report = {"refused": refusal.code, "tensor": refusal.tensor}
        except MemoryError:
            report = {"refused": "memory", "tensor": ""}
        except OSError as error:
            report = {"refused": "disk", "tensor": error.strerror or ""}
    with open(report_to, "wb", buffering=0, closefd=False) as out:
        write_all(out, memoryview(json.dumps(report).encode("ascii")))
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status)  # a deeply nested object may not survive being freed
