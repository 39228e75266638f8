"""Decoding some rows of a stored tensor from their own rows of its arrays, however large it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from compress.checkpoint import Checkpoint
from compress.formats.arrays import plain
from compress.formats.base import Entry, Format
from compress.tensor import DTYPES, Array, Role


def has_rows(fmt: Format, entry: Entry) -> bool:
    """Whether every array of the tensor has a row for each of its rows, or one for all.

    So it is with codes alone. A bitmask, factors and exact entries are read whole.
    """
    info, terms = entry.info, entry.terms
    if terms.codes is None or terms.rank or terms.outliers[1]:
        return False
    if info.role is Role.CONV1D or len(info.shape) != 2 or not info.size:
        return False
    return all(
        spec.at_most is None and (spec.shape[0] == info.shape[0] or math.prod(spec.shape) <= 2)
        for spec in fmt.layout(info, terms)
    )


def decode_rows(
    fmt: Format, entry: Entry, parts: Mapping[str, Checkpoint], start: int, stop: int
) -> Array:
    """[stop - start, columns] in the source's dtype, of a tensor that `has_rows`.

    parts  the files that hold its arrays
    Raises InputError for damaged arrays.
    """
    rows, columns = entry.info.shape
    if start == stop:
        return np.empty((0, columns), DTYPES[entry.info.dtype])

    def fetch(part: str, name: str) -> Array:
        stored = parts[part].info(name)
        if stored.shape[0] != rows:
            return parts[part].read(stored)  # one scale for all rows
        return parts[part].read(stored, start, stop)

    nbytes = entry.info.nbytes // rows * (stop - start)
    info = replace(entry.info, shape=(stop - start, columns), nbytes=nbytes)
    return np.ascontiguousarray(plain(fmt.unpack(replace(entry, info=info), fetch)))
