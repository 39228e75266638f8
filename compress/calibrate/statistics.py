"""The statistics file: what calibration measured, by input site, read one array at a time.

A *site* is one input that several weights may read (q, k and v share theirs). The file is a
safetensors file; its `__metadata__` holds one JSON record with the sites, the tensors of each, the
fingerprint of the model they belong to and what the inputs were. Arrays are named
`site/<number>/<kind>`, `tensor/<name>/<kind>` and `inputs/<name>`.

Kinds of a site (T inputs of `columns` values each; `blocks` is 1 but for grouped convolutions and
fused experts, whose rows are split into as many equal blocks, each with inputs of its own):

    diagonal        float32 [blocks, columns]           mean of x_k^2
    second_moment   float32 [blocks, columns, columns]  mean of x x^T, uncentred
    held_out        float32 [blocks, columns, columns]  the same over inputs kept apart
    mean            float32 [blocks, columns]           mean of x
    cross_moment    float32 [blocks, columns, columns]  mean of x_d x^T, x_d the dense model's
                                                        input where x is a compressed one's

Kinds of a tensor:

    output_fisher   float32 [rows]  mean of squared gradients of the model's log-likelihood, labels
                    drawn from the model itself, with respect to each output (its Fisher diagonal)

`inputs` are what the model was given (token ids or images), kept for passes that run it again
(peaks of activations are looked for in several rounds: `compress/calibrate/peaks.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.calibrate.soundness import wrong_inputs, wrong_values
from compress.checkpoint import Checkpoint, open_checkpoint, strict_json
from compress.errors import CompressError, InputError, UsageError, show
from compress.tensor import Array, TensorInfo

KEY = "compress.statistics"
VERSION = 1
READS = (1,)  # every version that was ever released: each has a golden file (tests/golden)

DIAGONAL = "diagonal"
SECOND_MOMENT = "second_moment"
HELD_OUT = "held_out"
MEAN = "mean"
CROSS_MOMENT = "cross_moment"
OUTPUT_FISHER = "output_fisher"
INPUTS = "inputs"
SITE_KINDS = frozenset({DIAGONAL, SECOND_MOMENT, HELD_OUT, MEAN})
TENSOR_KINDS = frozenset({OUTPUT_FISHER})
KINDS = SITE_KINDS | TENSOR_KINDS | {INPUTS}
# What is at hand without being collected: a diagonal lies in its matrix.
_IMPLIED = {DIAGONAL: SECOND_MOMENT}
_LARGEST_NUMBER = 1 << 63  # of a count, a site or a block

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Site:
    """One input: the weights that read it, how many inputs were seen, in how many blocks."""

    number: int
    tensors: tuple[str, ...]
    count: int  # of input vectors, held-out ones apart
    held_out_count: int = 0
    blocks: int = 1

    def key(self, kind: str) -> str:
        """The name of one of its arrays."""
        return f"site/{self.number}/{kind}"


@dataclass(frozen=True)
class Record:
    """What the file says of itself.

    fingerprint  of the checkpoint (`Checkpoint.sample_hash`)
    engine       "hf", "module" or "onnx"
    data         what was read: kind, digest, samples, tokens, settings (JSON types)
    """

    fingerprint: str
    engine: str
    sites: tuple[Site, ...]
    kinds: frozenset[str]
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line, keys in order."""
        body = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "engine": self.engine,
            "kinds": sorted(self.kinds),
            "data": dict(self.data),
            "sites": [spell_site(site) for site in self.sites],
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":"))


class Arrays(Protocol):
    """Where the arrays of sites and tensors come from: a file, or memory."""

    path: Path

    def has_array(self, name: str) -> bool:
        """Whether there is an array of this name."""

    def array(self, name: str) -> Matrix:
        """The array, float32."""

    def damaged(self, what: str) -> CompressError:
        """The error for an array that does not fit."""


class TensorStatistics:
    """What calibration knows of one tensor; arrays are read when they are asked for.

    Methods raise UsageError, naming tensor and kind, for what was not collected.
    """

    def __init__(
        self,
        owner: Arrays,
        info: TensorInfo,
        site: Site | None,
        beneath: TensorStatistics | None = None,
    ) -> None:
        """`beneath` answers for what `owner` does not hold."""
        self._owner, self._info, self.site, self._beneath = owner, info, site, beneath

    @property
    def count(self) -> int:
        """Input vectors behind the second moments."""
        return self.site.count if self.site is not None else 0

    def has(self, kind: str) -> bool:
        """Whether `kind` was collected for this tensor."""
        return self._has(kind) or (self._beneath is not None and self._beneath.has(kind))

    def _has(self, kind: str) -> bool:
        if kind in TENSOR_KINDS:
            return self._owner.has_array(f"tensor/{self._info.name}/{kind}")
        if self.site is None:
            return False
        kinds = {kind, _IMPLIED.get(kind, kind)}
        return any(self._owner.has_array(self.site.key(k)) for k in kinds)

    def diagonal(self) -> Matrix:
        """Mean squared inputs, float32 [blocks, columns]."""
        if self.site is not None and self._owner.has_array(self.site.key(DIAGONAL)):
            return self._read(DIAGONAL, 2)
        if not self._has(DIAGONAL) and self._beneath is not None:
            return self._beneath.diagonal()
        moment = self.second_moment()
        return np.ascontiguousarray(np.diagonal(moment, axis1=1, axis2=2))

    def second_moment(self) -> Matrix:
        """Mean x x^T, float32 [blocks, columns, columns]; not to be written to."""
        return self._read(SECOND_MOMENT, 3)

    def held_out(self) -> Matrix:
        """Mean x x^T of the inputs kept apart, like `second_moment`."""
        return self._read(HELD_OUT, 3)

    def mean(self) -> Matrix:
        """Mean input, float32 [blocks, columns]."""
        return self._read(MEAN, 2)

    def cross_moment(self) -> Matrix:
        """Mean x_d x^T, float32 [blocks, columns, columns]: rows by the dense model's input."""
        return self._read(CROSS_MOMENT, 3)

    def output_fisher(self) -> Matrix:
        """Fisher diagonal of the outputs, float32 [rows]."""
        if not self._has(OUTPUT_FISHER):
            return self._other(OUTPUT_FISHER).output_fisher()
        values = self._owner.array(f"tensor/{self._info.name}/{OUTPUT_FISHER}")
        rows = self._info.matrix_shape[0]
        if values.shape != (rows,):
            raise self._owner.damaged(f"{OUTPUT_FISHER} of {show(self._info.name)}: not [{rows}]")
        return values

    def _other(self, kind: str) -> TensorStatistics:
        """What answers for a kind that is not here."""
        if self._beneath is None:
            raise self._missing(kind)
        return self._beneath

    def _read(self, kind: str, dimensions: int) -> Matrix:
        if self.site is None or not self._has(kind):
            return self._other(kind)._read(kind, dimensions)
        values = self._owner.array(self.site.key(kind))
        rows, columns = self._info.matrix_shape
        wanted = (self.site.blocks, columns, columns)[:dimensions]
        if rows % self.site.blocks:
            raise self._owner.damaged(
                f"{kind} of {show(self._info.name)}: {rows} rows are not {self.site.blocks} blocks"
            )
        if values.shape != wanted:
            raise self._owner.damaged(
                f"{kind} of {show(self._info.name)} is {list(values.shape)}, not {list(wanted)}"
            )
        return values

    def _missing(self, kind: str) -> UsageError:
        return UsageError(
            f"tensor {show(self._info.name)}: {show(str(self._owner.path))} holds no {kind} for it",
            hint="calibrate again with --for and the recipe that is run, or leave it out with"
            " ignore",
        )


class Statistics:
    """An open statistics file. Arrays of the last few sites are kept: siblings share them."""

    def __init__(self, path: Path, checkpoint: Checkpoint, record: Record) -> None:
        self.path, self.record = path, record
        self._checkpoint = checkpoint
        self._sites = {name: site for site in record.sites for name in site.tensors}
        self._arrays = {info.name: info for info in checkpoint.infos()}
        self._kept: dict[str, Array] = {}
        self._lock = Lock()
        self._config: Mapping[str, Any] | None = None  # of the model, once it was seen
        self.beneath: Statistics | None = None  # answers for tensors and kinds that are not here

    def __enter__(self) -> Statistics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, info: TensorInfo) -> TensorStatistics:
        """What is known of one tensor of the model (perhaps nothing)."""
        beneath = None if self.beneath is None else self.beneath.of(info)
        site = self._sites.get(info.name)
        if site is None and beneath is not None:
            return beneath
        return TensorStatistics(self, info, site, beneath)

    def has_array(self, name: str) -> bool:
        """Whether the file holds an array."""
        return name in self._arrays

    def nbytes(self, name: str) -> int:
        """Bytes of an array in memory, 0 where there is none."""
        info = self._arrays.get(name)
        return 0 if info is None else info.nbytes

    def array(self, name: str) -> Matrix:
        """An array, float32, read-only. Raises InputError where it cannot be what its name says."""
        with self._lock:
            if name in self._kept:
                return self._kept[name]
        values = self._checkpoint.read(self._arrays[name])
        if values.dtype != np.float32:
            raise self.damaged(f"{show(name)} is {values.dtype}, not float32")
        kind = name.rpartition("/")[2]
        wrong = wrong_values(
            values,
            moment=kind in (SECOND_MOMENT, HELD_OUT),
            squares=kind in (DIAGONAL, OUTPUT_FISHER),
        )
        if wrong is not None:
            raise self.damaged(f"{show(name)} {wrong}")
        values.flags.writeable = False
        with self._lock:
            while len(self._kept) >= 2:
                self._kept.pop(next(iter(self._kept)))
            self._kept[name] = values
        return values

    def inputs(self) -> dict[str, Array]:
        """What the model was given, by name.

        `input_ids` int32 [samples, longest], -1 beyond the end of a shorter sample; or `images`
        uint8 [samples, height, width, channels], perhaps with `labels`.
        `compress.calibrate.inputs.batches_of` makes batches without padding of them. Raises
        InputError for anything else, and for ids that the model does not have (the one that
        `check_model` saw last).
        """
        found = {
            name.removeprefix("inputs/"): self._checkpoint.read(info)
            for name, info in self._arrays.items()
            if name.startswith("inputs/")
        }
        if found or INPUTS in self.record.kinds:
            wrong = wrong_inputs(found, self._config)
            if wrong is not None:
                raise self.damaged(wrong)
        return found

    def check_model(self, model: Checkpoint) -> None:
        """Raises UsageError where these are the statistics of another model."""
        if self.record.fingerprint != model.sample_hash():
            raise UsageError(
                f"{show(str(self.path))}: statistics of another model than {show(str(model.path))}",
                hint="calibrate this model: compress calibrate MODEL --for RECIPE --text F",
            )
        self._config = model.config

    def damaged(self, what: str) -> InputError:
        """The error for content that does not fit."""
        return InputError(
            f"{show(str(self.path))}: {what}", hint="calibrate again: the file is damaged"
        )

    def close(self) -> None:
        """Close the file."""
        self._checkpoint.close()


def open_statistics(path: str | Path) -> Statistics:
    """Open a statistics file. Raises UsageError if it is none, InputError if it is damaged."""
    checkpoint = open_checkpoint(path)
    try:
        raw = checkpoint.metadata.get(KEY)
        if raw is None:
            raise UsageError(
                f"{show(str(path))}: not a statistics file",
                hint="compress calibrate writes one",
            )
        record = _parse(raw, str(path))
    except BaseException:
        checkpoint.close()
        raise
    return Statistics(Path(path), checkpoint, record)


def _parse(raw: str, where: str) -> Record:
    body = strict_json.parse(raw.encode(), where, floats=True)
    try:
        if type(body["version"]) is not int or body["version"] not in READS:
            raise InputError(
                f"{show(where)}: statistics of version {show(str(body['version']))},"
                f" this program reads up to {VERSION}",
                hint="another version of this program wrote it: calibrate again",
            )
        if not isinstance(body["data"], dict):
            raise TypeError("data")
        return Record(
            _text(body["fingerprint"]),
            _text(body["engine"]),
            tuple(parse_site(site) for site in _listed(body["sites"])),
            frozenset(_text(kind) for kind in _listed(body["kinds"])),
            body["data"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{show(where)}: its record of statistics is damaged", hint="calibrate again"
        ) from error


def spell_site(site: Site) -> list[Any]:
    """A site as JSON."""
    return [site.number, list(site.tensors), site.count, site.held_out_count, site.blocks]


def parse_site(spelled: Any) -> Site:
    """What `spell_site` spelled. Raises TypeError or ValueError for anything else."""
    number, tensors, count, held_out_count, blocks = _listed(spelled)
    for value, least in ((number, 0), (count, 0), (held_out_count, 0), (blocks, 1)):
        if type(value) is not int or not least <= value <= _LARGEST_NUMBER:
            raise ValueError("a number of a site")
    names = tuple(_text(name) for name in _listed(tensors))
    return Site(number, names, count, held_out_count, blocks)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def missing_kinds(statistics: TensorStatistics, kinds: Iterable[str]) -> list[str]:
    """Those of `kinds` that were not collected for a tensor, in order of name."""
    return sorted(kind for kind in kinds if kind != INPUTS and not statistics.has(kind))
