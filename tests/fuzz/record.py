"""The record of compressed tensors in a weight file's metadata: written again, it is the same.

The input is the JSON text; strings that no strict header could hold are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compress.errors import InputError
from compress.formats.base import Entry
from compress.formats.metadata import KEY, decode, encode
from compress.passes.base import CodesSpec, Terms
from compress.tensor import Role, TensorInfo
from fuzz.checks import outcome, require

WORDS = (
    b'"bits":', b'"group_size":', b'"symmetric":true', b'"scale_dtype":"F16"', b'"per_tensor":true',
    b'"nonzeros":', b'"rank":', b'"factor_dtype":"I8"', b'"outliers":', b'"outlier_columns":',
    b'"dtype":"BF16"', b'"shape":[4,4]', b'"role":"linear"', b'"role":"experts"', b'"cast":{',
    b'"source_metadata":{', b'"version":1', b'"format":"native"', b'"tensors":{', b"null", b"[]",
    b"0", b"281474976710656", b"-1", b"true", b"1.0", b"\\ud800", b'""',
)  # fmt: skip


def seeds(corpus: Path | None) -> Iterator[bytes]:
    """Records of every kind of term."""
    codes = CodesSpec(4, 32, True, "F16")
    kinds = [
        Terms(codes=codes), Terms(nonzeros=(3, 3)), Terms(rank=2, factor_dtype="I8"),
        Terms(outliers=(2, 2), outlier_columns=(1, 1)),
        Terms(codes=codes, nonzeros=(8, 8), rank=1, outliers=(1, 1), outlier_columns=(1, 1)),
    ]  # fmt: skip
    for number, terms in enumerate(kinds):
        shape = (2, 4, 4) if number % 2 else (4, 4)
        role = Role.EXPERTS if number % 2 else Role.LINEAR
        entry = Entry(TensorInfo(f"w{number}", "", "BF16", shape, 32, role=role), terms)
        made = encode("native", [entry], source_metadata={"format": "tf"}, cast={"n": "F32"})
        yield made[KEY].encode()
    yield encode("native", [])[KEY].encode()


def target(data: bytes) -> None:
    """Read one record."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    record = outcome(lambda: decode({KEY: text}), names="record", errors=(InputError,))
    if record is None or record.format == "dense":
        return
    again = decode(
        encode(
            record.format, record.entries, source_metadata=record.source_metadata, cast=record.cast
        )
    )
    require(again.entries == record.entries, "other entries are read from what is written")
    require(again.cast == record.cast, "another cast is read from what is written")
