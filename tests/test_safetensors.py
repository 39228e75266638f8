"""The strict safetensors reader, and reading through `Checkpoint`."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from conftest import safetensors_bytes, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.checkpoint import open_checkpoint
from compress.checkpoint.files import InputFile
from compress.checkpoint.safetensors import BITS, Header, read_header
from compress.errors import CompressError, InputError, ResourceError, UsageError
from compress.tensor import DTYPES


@pytest.fixture
def alarm() -> Iterator[None]:
    """A call that blocks becomes an error after five seconds instead of a hang."""

    def ring(number: int, frame: object) -> None:
        raise AssertionError("blocked")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def header_of(data: bytes) -> Header:
    descriptor = os.memfd_create("header")
    os.write(descriptor, data)
    file = InputFile(descriptor, "x.safetensors")
    try:
        return read_header(file)
    finally:
        file.close()


def f32(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def test_reads_values_of_every_dtype(tmp_path: Path) -> None:
    tensors = {}
    for number, (tag, bits) in enumerate(sorted(BITS.items())):
        tensors[f"t{number}.{tag}"] = (tag, [2, 8], bytes(range(2 * bits)))
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.infos()) == len(BITS)
        for info in checkpoint.infos():
            values = checkpoint.read(info)
            data = tensors[info.name][2]
            assert values.tobytes() == data
            assert bytes(checkpoint.read_bytes(info, 0, info.nbytes)) == data
            if info.dtype in DTYPES:
                assert values.dtype == DTYPES[info.dtype] and values.shape == (2, 8)
            else:
                assert values.dtype == np.uint8 and values.shape == (len(data),)


def test_infos_come_in_the_order_of_the_data(tmp_path: Path) -> None:
    header = {
        "late": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "early": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + f32(1, 2))
    with open_checkpoint(path) as checkpoint:
        infos = checkpoint.infos()
        assert [i.name for i in infos] == ["early", "empty", "late"]
        assert infos[2].offset == 8 + len(text) + 4
        assert checkpoint.read(infos[1]).shape == (0, 3)
        assert checkpoint.read(infos[2]).tolist() == [2.0]
        assert checkpoint.info("late") == infos[2]
        with pytest.raises(UsageError, match="no tensor named"):
            checkpoint.info("missing")


@pytest.mark.parametrize("pad", range(8))
def test_unaligned_data_comes_out_aligned(tmp_path: Path, pad: int) -> None:
    tensors = {"pad": ("U8", [pad], bytes(pad)), "w": ("F64", [3], np.arange(3.0).tobytes())}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    with open_checkpoint(path) as checkpoint:
        values = checkpoint.read(checkpoint.info("w"))
        assert values.flags.aligned and values.flags.writeable and values.flags.c_contiguous
        assert values.ctypes.data % 8 == 0
        assert values.tolist() == [0.0, 1.0, 2.0]


def test_row_ranges(tmp_path: Path) -> None:
    whole = np.arange(60, dtype=np.float32).reshape(5, 3, 4).astype(ml_dtypes.bfloat16)
    tensors = {"a": ("U8", [3], b"abc"), "w": ("BF16", [5, 3, 4], whole.tobytes())}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    with open_checkpoint(path) as checkpoint:
        info = checkpoint.info("w")
        for start in range(6):
            for stop in range(start, 6):
                part = checkpoint.read(info, start, stop)
                assert part.dtype == whole.dtype and part.shape == (stop - start, 3, 4)
                assert part.tobytes() == whole[start:stop].tobytes()
        for start, stop in ((-1, 2), (0, 6), (3, 2), (6, 7)):
            with pytest.raises(UsageError, match="outside"):
                checkpoint.read(info, start, stop)
        buffer = bytearray(24)
        checkpoint.read_into(info, 24, memoryview(buffer))
        assert bytes(buffer) == whole[1].tobytes()
        with pytest.raises(UsageError):
            checkpoint.read_into(info, 100, memoryview(buffer))
        with pytest.raises(UsageError):
            checkpoint.read_bytes(info, 0, info.nbytes + 1)


def test_scalars_and_files_without_tensors(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"s": ("F32", [], f32(7))})
    with open_checkpoint(path) as checkpoint:
        value = checkpoint.read(checkpoint.info("s"))
        assert value.shape == () and value == 7
    with open_checkpoint(write_safetensors(tmp_path / "b.safetensors", {})) as checkpoint:
        assert checkpoint.infos() == []


def test_a_fifo_does_not_block(tmp_path: Path, alarm: None) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", tmp_path):
        with pytest.raises(InputError, match="named pipe"):
            open_checkpoint(path)


def test_missing_paths_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or directory"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CompressError):
        open_checkpoint(tmp_path / "nul\0byte")
    with pytest.raises(InputError, match=r"looked for model\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_an_io_error(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {})
    path.chmod(0)
    with pytest.raises(ResourceError, match="ermission"):
        open_checkpoint(path)


def test_a_file_that_shrinks_is_an_error_not_a_signal(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", [1 << 16], bytes(1 << 16))})
    with open_checkpoint(path) as checkpoint:
        checkpoint.check_unchanged()
        os.truncate(path, 5000)
        with pytest.raises(InputError, match="shorter"):
            checkpoint.read(checkpoint.info("w"))
        with pytest.raises(InputError, match="changed"):
            checkpoint.check_unchanged()


def test_a_replaced_file_is_still_the_one_that_was_opened(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", [4], b"old!")})
    with open_checkpoint(path) as checkpoint:
        other = write_safetensors(tmp_path / "n.safetensors", {"w": ("U8", [4], b"new!")})
        os.replace(other, path)
        assert checkpoint.read(checkpoint.info("w")).tobytes() == b"old!"
        checkpoint.check_unchanged()


def test_an_edit_in_place_is_noticed(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", [4], b"old!")})
    with open_checkpoint(path) as checkpoint:
        before, content = checkpoint.fingerprint(), checkpoint.content_hash()
        time.sleep(0.02)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
        with pytest.raises(InputError, match="changed"):
            checkpoint.check_unchanged()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.fingerprint() != before
        assert checkpoint.content_hash() != content


def test_a_sparse_8_gib_tensor_opens_without_memory(tmp_path: Path) -> None:
    rows, columns = 1 << 20, 8192
    head = json.dumps(
        {"w": {"dtype": "U8", "shape": [rows, columns], "data_offsets": [0, rows * columns]}}
    ).encode()
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + rows * columns)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_checkpoint(path) as checkpoint:
        info = checkpoint.info("w")
        assert not checkpoint.read(info, rows - 4).any()
        assert len(checkpoint.read_bytes(info, info.nbytes - 9, info.nbytes)) == 9
        checkpoint.fingerprint()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_opening_many_tensors_is_linear(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        names = [f"model.layers.{i // 7}.mlp.experts.{i % 7}.w{i}.weight" for i in range(count)]
        path = write_safetensors(tmp_path / "m.safetensors", {n: ("U8", [1], b"x") for n in names})
        start = time.process_time()
        with open_checkpoint(path) as checkpoint:
            assert len(checkpoint.infos()) == count
        return time.process_time() - start

    # Ten times the tensors: ten times the time if linear, a hundred if pairs are compared.
    assert seconds(100_000) < 30 * min(seconds(10_000) for _ in range(2))


def test_metadata_and_aliases(tmp_path: Path) -> None:
    notes = {"format": "pt", "lm_head.weight": "embed.weight", "other": "text"}
    tensors = {"embed.weight": ("F32", [1], f32(1)), "pt": ("F32", [1], f32(1))}
    path = write_safetensors(tmp_path / "m.safetensors", tensors, notes)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == notes
        assert checkpoint.aliases == {"lm_head.weight": "embed.weight"}


def test_hostile_names_are_escaped_in_messages(tmp_path: Path) -> None:
    name = "\x1b[2Jw\nERROR \u202e[/red]"
    path = write_safetensors(tmp_path / "m.safetensors", {name: ("F32", [3], f32(1))})
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert caught.value.message.isprintable() and caught.value.message.isascii()


def test_headers_that_other_readers_disagree_about() -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    for text in (
        f'{{"w":{entry},"w":{entry}}}',
        f'{{"w":{entry},"\\u0077":{entry}}}',
        f'{{"w":{entry[:-1]},"strides":[1]}}}}',
        '{"w":["U8",[1],[0,1]]}',
        f'{{"__metadata__":null,"w":{entry}}}',
        f'{{"__metadata__":{{"a":"1","a":"2"}},"w":{entry}}}',
        '{"w":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}',
        '{"w":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}',
        '{"w":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}',
    ):
        with pytest.raises(InputError):
            header_of(len(text).to_bytes(8, "little") + text.encode() + b"x")
    good = f'{{"w":{entry}}}'
    assert len(header_of(len(good).to_bytes(8, "little") + good.encode() + b"x").entries) == 1


def test_deep_json_is_refused_before_it_is_parsed() -> None:
    for text in ('{"w":' * 5000, "[" * 1_000_000, '{"\\\\":' + "[" * 300, '"' + "[" * 9):
        with pytest.raises(InputError):
            header_of(len(text).to_bytes(8, "little") + text.encode())
    brackets = '{"__metadata__":{"a":"' + "[" * 1000 + '\\"' + "{" * 1000 + '"}}'
    assert header_of(len(brackets).to_bytes(8, "little") + brackets.encode()).entries == []


def test_importing_the_reader_does_not_import_torch() -> None:
    code = "import sys, compress.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


names = st.text(max_size=6).filter(lambda name: name != "__metadata__")
tags = st.sampled_from(sorted(tag for tag, bits in BITS.items() if bits % 8 == 0))
shapes = st.lists(st.integers(0, 3), max_size=4)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file, or one with a few bytes changed, cut, doubled or swapped for a token."""
    tensors = {}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        tag, shape = draw(tags), draw(shapes)
        nbytes = int(np.prod(shape, dtype=np.int64)) * BITS[tag] // 8
        tensors[name] = (tag, shape, draw(st.binary(min_size=nbytes, max_size=nbytes)))
    data = bytearray(safetensors_bytes(tensors, draw(st.none() | st.just({"k": "v"}))))
    length = int.from_bytes(data[:8], "little")
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(8, max(8, len(data) - 1)))
        what = draw(st.sampled_from(["flip", "cut", "double", "token", "digit"]))
        if what == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at : at + draw(st.integers(1, 4))]
        elif what == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
        elif what == "token":
            token = draw(st.sampled_from(['"', "null", "{}", ",", "[", "]", "1e0", "-", "\\u0077"]))
            data[at:at] = token.encode()
        elif what == "digit":
            spots = [i for i in range(8, min(8 + length, len(data))) if chr(data[i]).isdigit()]
            if spots:
                data[draw(st.sampled_from(spots))] = ord(draw(st.sampled_from("0123456789")))
    if draw(st.booleans()):  # keep the length field true to what became of the header
        end = data.rfind(b"}", 8) + 1
        data[:8] = max(end - 8, 0).to_bytes(8, "little")
    return bytes(data)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files())
def test_what_we_accept_the_library_accepts_with_the_same_bytes(data: bytes) -> None:
    try:
        header = header_of(data)
    except InputError:
        return
    theirs = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    assert theirs.keys() == {entry.name for entry in header.entries}
    for entry in header.entries:
        other = theirs[entry.name]
        assert tuple(other["shape"]) == entry.shape
        assert other["dtype"] == entry.dtype
        assert bytes(other["data"]) == data[entry.offset : entry.offset + entry.nbytes]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(names, st.tuples(tags, shapes), max_size=6))
def test_what_the_library_writes_we_accept(spec: dict[str, tuple[str, list[int]]]) -> None:
    tensors = {
        name: (tag, shape, bytes(int(np.prod(shape, dtype=np.int64)) * BITS[tag] // 8))
        for name, (tag, shape) in spec.items()
    }
    header = header_of(safetensors_bytes(tensors))
    assert {e.name: (e.dtype, list(e.shape)) for e in header.entries} == spec
