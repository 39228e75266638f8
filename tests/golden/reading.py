"""What golden outputs are held to, read without the readers under test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
STATISTICS = "statistics.safetensors"  # beside expected.json, where there is no output
RECORD = "compress"  # the entry of `__metadata__`


def outputs() -> list[Path]:
    """The folders of outputs: each has OUT as `out`."""
    return sorted(path.parent for path in HERE.glob("*/out"))


def expected_of(folder: Path) -> dict[str, Any]:
    """What a folder's file says."""
    body: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return body


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def weight_files(folder: Path) -> list[Path]:
    """The weight files of an output or a checkpoint."""
    return sorted(folder.glob("model*.safetensors"))


def stored_versions(out: Path) -> dict[str, Any]:
    """The format of an output and the version numbers in it; record: None where it has none."""
    body = json.loads((out / "manifest.json").read_text())
    records = [header_of(path)[0]["__metadata__"].get(RECORD) for path in weight_files(out)]
    numbers = {None if text is None else json.loads(text)["version"] for text in records}
    (number,) = numbers
    return {"format": body["format"], "manifest": body["manifest_version"], "record": number}


def contents(files: list[Path]) -> dict[str, Any]:
    """The `__metadata__` of safetensors files; array -> dtype, shape and SHA-256 of its data."""
    found, metadata = {}, {}
    for path in files:
        header, data = header_of(path)
        metadata |= header.pop("__metadata__", {})
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = {
                "dtype": entry["dtype"],
                "shape": entry["shape"],
                "sha256": hashlib.sha256(data[begin:end]).hexdigest(),
            }
    return {"metadata": metadata, "tensors": dict(sorted(found.items()))}


def write_expected(path: Path, body: dict[str, Any]) -> None:
    """JSON with a line a tensor."""
    rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(e)}" for n, e in body["tensors"].items())
    rest = json.dumps(body | {"tensors": None}, indent=1)
    path.write_text(rest.replace('"tensors": null', f'"tensors": {{\n{rows}\n }}') + "\n")


def graph_output(path: Path) -> list[float]:
    """What onnxruntime makes of one fixed input, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    shape = (1, 2, 4, 4)
    x = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    (y,) = session.run(None, {"x": x})
    return [float(value) for value in y.reshape(-1)]
