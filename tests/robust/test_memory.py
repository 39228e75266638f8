"""Memory does not grow with the model: not with the number of tensors, not with one tensor's size.

What commands take on whole models is in bench/memory_table.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from damage import produce
from forked_cli import forked
from toolbox import tiny_llama

from compress.output import open_output

PASS = 'quantize:bits=4,group=128,search=none,targets=["*"]'
ROW = 4096  # columns, of 2 bytes
GROWTH = 48 << 20  # more tiles are in flight where there are more; readers take blocks of 8 MB


def sparse(path: Path, tensors: int, rows: int) -> Path:
    """bf16 matrices [rows, 4096] of zeros but for some rows; the zeros take no disk."""
    nbytes = rows * ROW * 2
    header = {
        f"layers.{i}.weight": {
            "dtype": "BF16",
            "shape": [rows, ROW],
            "data_offsets": [i * nbytes, (i + 1) * nbytes],
        }
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    values = np.random.default_rng(0).standard_normal((16, ROW)).astype(ml_dtypes.bfloat16)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i in range(tensors):
            file.seek(8 + len(text) + i * nbytes + nbytes // 2)
            file.write(values.tobytes())
        file.truncate(8 + len(text) + tensors * nbytes)
    return path


def peaks(folder: Path, tensors: int, rows: int) -> dict[str, int]:
    """Peak memory of each command on such a model."""
    folder.mkdir()
    model, out, dense = sparse(folder / "m.safetensors", tensors, rows), folder / "o", folder / "d"
    commands: dict[str, list[str | Path]] = {
        "run": ["run", model, "-o", out, PASS, "--jobs", "2", "--no-fsync"],
        "verify": ["verify", out],
        "unpack": ["unpack", out, "-o", dense, "--no-fsync"],
        "diff": ["diff", model, out],
    }
    found = {}
    for name, words in commands.items():
        done = forked([str(word) for word in words])
        assert done.returncode == 0, done.stderr
        found[name] = done.peak_bytes
    return found


def test_twenty_times_the_tensors_take_no_more_memory(tmp_path: Path) -> None:
    small, large = (peaks(tmp_path / str(n), n, 256) for n in (4, 80))  # 2 MB each
    for name, peak in small.items():
        assert large[name] < peak + GROWTH, name


def test_a_tensor_of_twenty_times_the_size_takes_no_more_memory(tmp_path: Path) -> None:
    small, large = (peaks(tmp_path / str(n), 1, n) for n in (1024, 20480))  # 8 and 168 MB
    for name, peak in small.items():
        assert large[name] < peak + GROWTH, name


CODES = [
    "quantize:bits=4,group=32",
    "quantize:bits=3,group=32,symmetric=false",
    "quantize:bits=8,group=0",
    "quantize:bits=5,group=-1",
]


@pytest.mark.parametrize("name", ["native", "onnx", "compressed-tensors"])
@pytest.mark.parametrize("word", CODES)
def test_rows_decode_as_the_whole_does(tmp_path: Path, name: str, word: str) -> None:
    if name == "compressed-tensors" and ("=3" in word or "=5" in word):
        pytest.skip("a width that the format does not hold")
    model = tiny_llama(tmp_path / "model", dtype=ml_dtypes.bfloat16, layers=1)
    with open_output(produce(model, tmp_path / "out", [word], name)) as output:
        coded = [info for info in output.infos() if info.name in output.entries]
        assert coded
        for info in coded:
            whole = np.array(output._decoded(info))
            rows = info.shape[0]
            for start, stop in ((0, rows), (0, 1), (rows - 1, rows), (3, 17), (5, 5)):
                part = output.read(info, start, stop)
                assert part.tobytes() == whole[start:stop].tobytes(), (info.name, start, stop)
            flat = whole.tobytes()
            for start, stop in ((0, len(flat)), (1, 3), (len(flat) - 3, len(flat)), (77, 901)):
                assert bytes(output.read_bytes(info, start, stop)) == flat[start:stop]
