"""The data of tensors in an .onnx file: how much there has to be, where it lies, what it says.

Three forms: raw little-endian bytes, typed fields of the message, and a range of another file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint.files import InputFile, open_inside
from compress.checkpoint.onnx_wire import DOUBLES, FLOATS, INT32S, INT64S, UINT64S, Scanned, Span
from compress.checkpoint.safetensors import MAX_DIMENSION, MAX_RANK
from compress.errors import InputError, show

# Bits per element by TensorProto.DataType; strings have none.
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64,
    15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2, 27: 6,
    28: 6,
}  # fmt: skip
_STRING, _COMPLEX = 8, (14, 15)
# Which typed field holds a type's elements; what is not named here lies in int32_data.
_FIELDS = {1: FLOATS, 7: INT64S, 11: DOUBLES, 12: UINT64S, 13: UINT64S, 14: FLOATS, 15: DOUBLES}
_FIELD_NAMES = {FLOATS: "float_data", INT32S: "int32_data", 6: "string_data", INT64S: "int64_data",
                DOUBLES: "double_data", UINT64S: "uint64_data"}  # fmt: skip
# Integers that are stored wider than they are: numpy type, lowest and highest value.
_NARROW: dict[int, tuple[Any, int, int]] = {
    2: (np.uint8, 0, 255), 3: (np.int8, -128, 127), 4: (np.uint16, 0, 65535),
    5: (np.int16, -32768, 32767), 9: (np.uint8, 0, 1), 10: (np.uint16, 0, 65535),
    12: (np.uint32, 0, (1 << 32) - 1), 16: (np.uint16, 0, 65535),
}  # fmt: skip
_BLOCK = 1 << 22
_LONGEST = 10  # bytes of a varint
_KEYS = frozenset({"location", "offset", "length", "checksum"})
_NUMBER = re.compile(r"[0-9]{1,19}")


def bad(where: str, name: str, what: str, hint: str | None = None) -> InputError:
    """An error of a tensor of a file; `where` is safe to print."""
    hint = hint or "the file is damaged, or not what an exporter writes: export the model again"
    return InputError(f"{where}: tensor '{show(name)}': {what}", hint=hint)


def needed_bytes(where: str, name: str, data_type: int, dims: list[int]) -> int:
    """Bytes that a tensor's type and dims need (elements of strings). Raises InputError."""
    if data_type not in BITS and data_type != _STRING:
        raise bad(where, name, f"unknown data type {data_type}")
    if len(dims) > MAX_RANK:
        raise bad(where, name, f"{len(dims)} dimensions, more than {MAX_RANK}")
    count = 1
    for dimension in dims:
        if not 0 <= dimension < MAX_DIMENSION:
            raise bad(where, name, f"a dimension of {dimension}, not from 0 to 2^48 - 1")
        count *= dimension
    if count >= MAX_DIMENSION:
        raise bad(where, name, f"{count} elements, more than 2^48 - 1")
    return -(-count * BITS.get(data_type, 8) // 8)


def check_inline(tensor: Any, where: str) -> None:
    """Check a parsed TensorProto that stays where it is: its data is in it, and complete."""
    name = tensor.name if isinstance(tensor.name, str) else repr(tensor.name)
    if tensor.data_location or len(tensor.external_data):
        raise bad(
            where, name, "its data lies in another file, which only initializers of the main graph"
            " may have", "save the model without external data for constants and subgraphs",
        )  # fmt: skip
    if tensor.HasField("segment"):
        raise bad(where, name, "one segment of a tensor, which nothing writes any more")
    needed = needed_bytes(where, name, tensor.data_type, list(tensor.dims))
    filled = [field for field in _FIELD_NAMES.values() if len(getattr(tensor, field))]
    if len(filled) + tensor.HasField("raw_data") > 1:
        raise bad(where, name, "its data is given twice")
    if tensor.HasField("raw_data"):
        if tensor.data_type == _STRING or len(tensor.raw_data) != needed:
            raise wrong_size(where, name, len(tensor.raw_data), needed)
        return
    wanted, count = typed_field(tensor.data_type), math.prod(tensor.dims)
    if tensor.data_type in _COMPLEX:
        count *= 2
    elif BITS.get(tensor.data_type, 8) < 8:
        count = needed
    if filled and filled[0] != _FIELD_NAMES[wanted]:
        raise bad(where, name, f"its data is in {filled[0]}, which is not for its type")
    found = len(getattr(tensor, _FIELD_NAMES[wanted]))
    if found != count:
        raise bad(where, name, f"{found} elements of data where its dims need {count}")


def wrong_size(where: str, name: str, found: int, needed: int) -> InputError:
    """Data of another size than type and dims need."""
    return bad(where, name, f"{found} bytes of data where type and dims need {needed}")


def typed_field(data_type: int) -> int:
    """The number of the typed field that holds a data type's elements."""
    return 6 if data_type == _STRING else _FIELDS.get(data_type, INT32S)


# ---------------------------------------------------------------- typed fields


def copy_typed(file: InputFile, tensor: Scanned, needed: int, target: IO[bytes]) -> None:
    """Append a typed field's elements to `target` as little-endian bytes. Raises InputError.

    tensor  of a type of `skeleton.TAGS`, with one typed field
    needed  bytes that its type and dims need
    """
    where = show(file.name)
    ((number, pieces),) = tensor.data.items()
    if number != typed_field(tensor.data_type):
        wrong = _FIELD_NAMES[number]
        raise bad(where, tensor.name, f"its data is in {wrong}, which is not for its type")
    done = 0
    for block in _blocks(file, tensor, pieces, is_varint=number not in (FLOATS, DOUBLES)):
        values = block
        if number not in (FLOATS, DOUBLES):
            values = _narrowed(_decoded(block, where, tensor.name), number, tensor, where)
        done += values.nbytes
        if done > needed:
            break
        target.write(values.tobytes())
    if done != needed:
        size = BITS[tensor.data_type] // 8
        more = " or more" if done > needed else ""
        raise bad(
            where, tensor.name,
            f"{done // size}{more} elements of data where its dims need {needed // size}",
        )  # fmt: skip


def _blocks(
    file: InputFile, tensor: Scanned, pieces: list[Span | bytearray], *, is_varint: bool
) -> Iterator[NDArray[np.uint8]]:
    """Bytes of a field in blocks; no varint is cut."""
    width = 1 if is_varint else BITS[tensor.data_type] // 8
    for piece in pieces:
        if isinstance(piece, Span) and piece.length % width:
            raise bad(
                show(file.name), tensor.name, f"{piece.length} bytes of {width}-byte elements"
            )
        if isinstance(piece, bytearray):
            yield np.frombuffer(bytes(piece), np.uint8)
            continue
        at, end = piece.offset, piece.offset + piece.length
        while at < end:
            block = np.frombuffer(file.read(at, min(_BLOCK, end - at)), np.uint8)
            if is_varint and at + block.size < end:
                last = np.flatnonzero(block[-_LONGEST:] < 0x80)
                if not last.size:
                    raise bad(show(file.name), tensor.name, "a number without end in its data")
                block = block[: block.size - min(_LONGEST, block.size) + int(last[-1]) + 1]
            yield block
            at += block.size


def _decoded(block: NDArray[np.uint8], where: str, name: str) -> NDArray[np.uint64]:
    """The varints of a block. Raises InputError."""
    ends = np.flatnonzero(block < 0x80)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: ends.size]
    lengths = ends - starts + 1
    complete = not block.size or (ends.size and ends[-1] == block.size - 1)
    if not complete or (ends.size and lengths.max() > _LONGEST):
        raise bad(where, name, "a number without end in its data")
    values = np.zeros(ends.size, np.uint64)
    for place in range(int(lengths.max()) if ends.size else 0):
        longer = np.flatnonzero(lengths > place)
        part = (block[starts[longer] + place] & 0x7F).astype(np.uint64)
        if place == _LONGEST - 1 and part.max() > 1:
            raise bad(where, name, "a number of more than 64 bits in its data")
        values[longer] |= part << np.uint64(7 * place)
    return values


def _narrowed(values: NDArray[np.uint64], number: int, tensor: Scanned, where: str) -> NDArray[Any]:
    """Elements in the tensor's own type. Raises InputError for one that does not fit."""
    if number == INT32S:  # an int32 keeps the low 32 bits, as any reader of protobuf does
        numbers: NDArray[Any] = values.astype(np.uint32).view(np.int32)
    elif number == INT64S:
        return values.view(np.int64)
    else:
        numbers = values
    if tensor.data_type not in _NARROW:
        return numbers
    kind, least, most = _NARROW[tensor.data_type]
    if numbers.size and (int(numbers.min()) < least or int(numbers.max()) > most):
        raise bad(
            where, tensor.name,
            f"values from {numbers.min()} to {numbers.max()}, its type holds {least} to {most}",
        )  # fmt: skip
    return numbers.astype(kind)


# ---------------------------------------------------------------- other files


class External:
    """Files beside the .onnx file that hold data of its initializers; each is opened once.

    directory  the real path of the folder that the .onnx file lies in
    """

    def __init__(self, model: InputFile, directory: str) -> None:
        self._model = model
        self._where = show(model.name)
        self._directory = directory
        self.files: dict[str, InputFile] = {}
        self._spans: dict[str, dict[tuple[int, int], str]] = {}

    def place(self, tensor: Any, needed: int) -> tuple[str, int]:
        """(file, offset) of an initializer's data. Raises InputError."""
        name = tensor.name
        entries = self._entries(tensor)
        location = self._location(name, entries.get("location", ""))
        if location not in self.files:
            self.files[location] = self._open(name, location)
        size = self.files[location].size
        offset = self._number(name, entries, "offset", 0)
        length = self._number(name, entries, "length", max(0, size - offset))
        if offset > size or length > size - offset:
            raise bad(
                self._where, name,
                f"bytes {offset} to {offset + length} of {show(location)}, which has {size}",
                "the file is cut short, or belongs to another model",
            )  # fmt: skip
        if length != needed:
            raise wrong_size(self._where, name, length, needed)
        if length:
            self._spans.setdefault(location, {})[offset, offset + length] = name
        return location, offset

    def check_overlaps(self) -> None:
        """Two tensors may share all of their bytes, but not some. Raises InputError."""
        for location, spans in self._spans.items():
            behind = 0
            for (offset, end), name in sorted(spans.items()):
                if offset < behind:
                    raise bad(
                        self._where, name, f"its bytes in {show(location)} overlap another tensor's"
                    )
                behind = end

    def close(self) -> None:
        """Close every file."""
        for file in self.files.values():
            file.close()

    def _entries(self, tensor: Any) -> Mapping[str, str]:
        entries: dict[str, str] = {}
        for entry in tensor.external_data:
            if not isinstance(entry.key, str) or not isinstance(entry.value, str):
                raise bad(self._where, tensor.name, "its external data is described in no UTF-8")
            if entry.key not in _KEYS or entry.key in entries:
                what = "twice" if entry.key in entries else "unknown"
                raise bad(
                    self._where,
                    tensor.name,
                    f"key '{show(entry.key)}' of its external data: {what}",
                )
            entries[entry.key] = entry.value
        return entries

    def _number(self, name: str, entries: Mapping[str, str], key: str, default: int) -> int:
        text = entries.get(key)
        if text is None:
            return default
        if not _NUMBER.fullmatch(text):
            raise bad(
                self._where, name, f"{key} '{show(text)}' of its external data is no decimal number"
            )
        return int(text)

    def _location(self, name: str, location: str) -> str:
        parts = location.split("/")
        if "" in parts or ".." in parts or set(location) & set("\\\0*"):
            raise bad(
                self._where, name,
                f"its data is said to be in '{show(location)}', which is no path below the folder",
                "data of an .onnx file lies beside it",
            )  # fmt: skip
        return os.path.normpath(location)

    def _open(self, name: str, location: str) -> InputFile:
        try:
            file = open_inside(self._directory, location)
        except InputError as error:
            raise bad(
                self._where, name, error.message, "put the file itself beside the .onnx file"
            ) from None
        own = (self._model.status.st_dev, self._model.status.st_ino)
        what = None
        if (file.status.st_dev, file.status.st_ino) == own:
            what = "is the .onnx file itself"
        elif file.status.st_nlink > 1:
            what = "has another name as well (a hard link), maybe outside of the folder"
        if what is not None:
            file.close()
            raise bad(
                self._where, name, f"{show(location)} {what}", "put a copy of the data beside it"
            )
        return file
