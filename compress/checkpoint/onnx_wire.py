"""The wire format of an .onnx file, walked without loading its weights.

An .onnx file is one protobuf message, ModelProto. A parser loads all of it, and most of it is the
data of initializers. Here the messages down to the initializers are walked instead: where an
initializer's data lies is noted, and what remains is a message of the graph alone, small enough for
the package onnx to parse. Fields that this walk does not know are refused, and so are fields that
protobuf would merge or overwrite: a file has one meaning.

Source: Protocol Buffers encoding; onnx.proto, IR version 13.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from compress.checkpoint.files import InputFile
from compress.checkpoint.skeleton import MAX_BYTES, TAGS
from compress.errors import InputError, show

MAX_GRAPH = 256 << 20  # of what is no weight
MAX_INLINE = 1 << 20  # of a tensor of a type that a checkpoint cannot hold
SMALL = 4096  # data up to this size stays in the message, too
_MAX_INITIALIZERS = 400_000
_MAX_LOOSE = 16 << 20  # bytes of elements that are written one by one
_WINDOW = 1 << 18

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Fields by number: the wire type of one value; repeated numbers may be packed as well.
_MODEL = {1: VARINT, 2: BYTES, 3: BYTES, 4: BYTES, 5: VARINT, 6: BYTES, 7: BYTES, 8: BYTES,
          14: BYTES, 20: BYTES, 25: BYTES, 26: BYTES}  # fmt: skip
_GRAPH = {1: BYTES, 2: BYTES, 5: BYTES, 10: BYTES, 11: BYTES, 12: BYTES, 13: BYTES, 14: BYTES,
          15: BYTES, 16: BYTES}  # fmt: skip
_TENSOR = {1: VARINT, 2: VARINT, 3: BYTES, 4: FIXED32, 5: VARINT, 6: BYTES, 7: VARINT, 8: BYTES,
           9: BYTES, 10: FIXED64, 11: VARINT, 12: BYTES, 13: BYTES, 14: VARINT,
           16: BYTES}  # fmt: skip
_ONCE_MODEL, _ONCE_GRAPH, _ONCE_TENSOR = {1, 7}, {2}, {2, 3, 8, 9, 14}
_PACKABLE = {1, 4, 5, 7, 10, 11}  # of a tensor
FLOATS, INT32S, STRINGS, INT64S, RAW, DOUBLES, UINT64S = 4, 5, 6, 7, 9, 10, 11
_DATA = {FLOATS, INT32S, STRINGS, INT64S, RAW, DOUBLES, UINT64S}
_DISGUISES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model", "run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive named as .onnx", None),
    (b"\x80\x02", "a pickle named as .onnx", None),
    (b"GGUF", "a GGUF file named as .onnx", None),
)


class Span(NamedTuple):
    """A range of a file's bytes."""

    offset: int
    length: int


@dataclass
class Scanned:
    """An initializer as it was found.

    data  by field number: ranges of the file, or bytes of elements that were written one by one;
          all of a field's pieces, one behind the other, are its packed form
    """

    name: str = ""
    data_type: int = 0
    dims: list[int] = field(default_factory=list)
    data: dict[int, list[Span | bytearray]] = field(default_factory=dict)
    data_bytes: int = 0

    def note(self, number: int, piece: Span) -> None:
        """Another range of a data field; an empty one says something of raw data only."""
        if not piece.length and number != RAW:
            return
        self.data.setdefault(number, []).append(piece)
        self.data_bytes += piece.length


class _Field(NamedTuple):
    number: int
    wire: int
    begin: int  # of the tag
    at: int  # of the payload
    end: int
    value: int  # of a varint


class Scan:
    """A scanned file.

    model         the serialized ModelProto without the data of large initializers
    initializers  of the graph, in the order of the message
    Data of types that a checkpoint cannot hold stays in the message, or is dropped as well where
    the model will only be checked (`only_check`).
    Raises InputError for what is no ONNX model, or not exactly one.
    """

    def __init__(self, file: InputFile, *, only_check: bool = False) -> None:
        self._file = file
        self._only_check = only_check
        self._where = show(file.name)
        self._window, self._start = b"", 0
        self._kept = self._loose = 0
        self.initializers: list[Scanned] = []
        self._check_start()
        self.model = self._model()

    def _check_start(self) -> None:
        if self._file.size == 0:
            raise InputError(f"{self._where}: the file is empty", hint="download it again")
        start = self._file.read(0, min(self._file.size, 64))
        for magic, what, hint in _DISGUISES:
            if start.startswith(magic):
                raise InputError(f"{self._where}: {what}", hint=hint)
        if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
            raise InputError(f"{self._where}: an HTML page", hint="download the file again")
        if self._file.size > MAX_BYTES:
            raise InputError(
                f"{self._where}: {self._file.size} bytes, more than a protobuf message can have",
                hint="save the model with external data",
            )

    def _model(self) -> bytes:
        parts: list[bytes] = []
        for one in self._fields(0, self._file.size, _MODEL, _ONCE_MODEL, "the model"):
            if one.number == 7:
                graph = self._graph(one.at, one.end)
                parts += [b"\x3a", varint(len(graph)), graph]
            elif one.number == 20:
                raise InputError(
                    f"{self._where}: holds training information",
                    hint="export the model for inference",
                )
            else:
                parts.append(self._keep(one.begin, one.end))
        return b"".join(parts)

    def _graph(self, start: int, end: int) -> bytes:
        parts: list[bytes] = []
        for one in self._fields(start, end, _GRAPH, _ONCE_GRAPH, "the graph"):
            if one.number == 5:
                tensor = self._tensor(one.at, one.end)
                parts += [b"\x2a", varint(len(tensor)), tensor]
            else:
                parts.append(self._keep(one.begin, one.end))
        return b"".join(parts)

    def _tensor(self, start: int, end: int) -> bytes:
        """Note an initializer; returns its message, without its data where that is large."""
        if len(self.initializers) >= _MAX_INITIALIZERS:
            raise InputError(f"{self._where}: more than {_MAX_INITIALIZERS} initializers")
        found = Scanned()
        self.initializers.append(found)
        other: list[tuple[int, int]] = []
        for one in self._fields(start, end, _TENSOR, _ONCE_TENSOR, "an initializer", _PACKABLE):
            if one.number in _DATA:
                self._note_data(found, one)
                continue
            other.append((one.begin, one.end))
            if one.number == 1:
                found.dims += self._integers(one)
            elif one.number == 2:
                found.data_type = one.value
            elif one.number == 8:
                found.name = self._name(one)
        stays = found.data_type not in TAGS and not self._only_check
        if stays and found.data_bytes > MAX_INLINE:
            raise InputError(
                f"{self._where}: tensor '{show(found.name)}': {found.data_bytes} bytes of ONNX data"
                f" type {found.data_type}, which a checkpoint cannot hold",
                hint="use the model before it was quantized",
            )
        if found.data_bytes <= SMALL or stays:
            return self._keep(start, end)
        return b"".join(self._keep(*span) for span in other)

    def _note_data(self, found: Scanned, one: _Field) -> None:
        if one.wire == BYTES:
            found.note(one.number, Span(one.at, one.end - one.at))
            return
        # Elements one by one: old writers, and nobody for large tensors.
        payload = self._bytes(one.at, one.end)
        self._loose += len(payload)
        if self._loose > _MAX_LOOSE:
            raise InputError(
                f"{self._where}: tensor '{show(found.name)}': elements written one by one",
                hint="load and save the model with the package onnx",
            )
        pieces = found.data.setdefault(one.number, [])
        if not pieces or isinstance(pieces[-1], Span):
            pieces.append(bytearray())
        last = pieces[-1]
        if isinstance(last, bytearray):
            last += payload
        found.data_bytes += len(payload)

    def _integers(self, one: _Field) -> list[int]:
        """Dims: one, or several packed."""
        if one.wire == VARINT:
            return [_signed(one.value)]
        found, at = [], one.at
        while at < one.end:
            value, at = self._varint(at, one.end)
            found.append(_signed(value))
        return found

    def _name(self, one: _Field) -> str:
        try:
            return self._bytes(one.at, one.end).decode()
        except UnicodeDecodeError:
            raise InputError(f"{self._where}: an initializer's name is not UTF-8") from None

    def _fields(
        self, start: int, end: int, known: dict[int, int], once: set[int], what: str,
        packable: set[int] = frozenset(),  # type: ignore[assignment]
    ) -> Iterator[_Field]:  # fmt: skip
        """The fields of a message that lies in [start, end)."""
        seen: set[int] = set()
        at = start
        while at < end:
            begin = at
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if number not in known:
                raise self._damaged(f"{what} has an unknown field {number}", begin)
            if wire != known[number] and not (wire == BYTES and number in packable):
                raise self._damaged(f"field {number} of {what} has wire type {wire}", begin)
            if number in once and number in seen:
                raise self._damaged(f"{what} has field {number} twice", begin)
            seen.add(number)
            value = 0
            payload = at
            if wire == VARINT:
                value, stop = self._varint(at, end)
            elif wire == BYTES:
                length, payload = self._varint(at, end)
                stop = payload + length
            else:
                stop = at + (8 if wire == FIXED64 else 4)
            if stop > end:
                raise self._damaged(f"field {number} of {what} is longer than what holds it", begin)
            yield _Field(number, wire, begin, payload, stop, value)
            at = stop

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The unsigned number at `at` and where it ends. Raises InputError."""
        value = shift = 0
        begin = at
        while at < end and shift < 70:
            place = at - self._start
            if not 0 <= place < len(self._window):
                self._start = at
                self._window = self._file.read(at, min(_WINDOW, self._file.size - at))
                place = 0
            byte = self._window[place]
            value |= (byte & 0x7F) << shift
            at += 1
            shift += 7
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at
        raise self._damaged("a number without end", begin)

    def _keep(self, start: int, end: int) -> bytes:
        """Bytes of the graph's own message, of which there may be so many."""
        self._kept += end - start
        if self._kept > MAX_GRAPH:
            raise InputError(
                f"{self._where}: a graph of more than {MAX_GRAPH >> 20} MiB without its weights",
                hint="hold weights as initializers, not as attributes of nodes",
            )
        return self._bytes(start, end)

    def _bytes(self, start: int, end: int) -> bytes:
        first = start - self._start
        if first >= 0 and end - self._start <= len(self._window):
            return self._window[first : end - self._start]
        return self._file.read(start, end - start)

    def _damaged(self, what: str, at: int) -> InputError:
        return InputError(
            f"{self._where}: no ONNX model, or a damaged one: {what} (at byte {at})",
            hint="download or export the file again",
        )


def varint(value: int) -> bytes:
    """A number below 2^64 as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
