"""What a model is judged on, read and checked before any work: text, sentence pairs, images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.calibrate import data as text_data
from compress.calibrate import inputs as samples_of
from compress.calibrate.inputs import IDS
from compress.checkpoint import Checkpoint
from compress.errors import InputError, UsageError, show
from compress.evaluate.metrics import IMAGES, PAIRS, TEXT
from compress.evaluate.windows import Window, apart, overlapping
from compress.tensor import Array

IMAGE_BATCH = 100


@dataclass(frozen=True)
class Request:
    """Where the data lies and how it is cut.

    kind       TEXT, PAIRS or IMAGES
    ids        the file holds token ids (.npy), not text
    window     tokens of a sequence, BOS included; None: 512, or the model's positions if fewer
    stride     None: windows do not overlap
    samples    windows, pairs or images at most
    documents  a text is cut at blank lines instead, a sequence a document
    """

    kind: str
    path: Path
    ids: bool = False
    window: int | None = None
    stride: int | None = None
    samples: int | None = None
    documents: bool = False

    def validate(self) -> None:
        """Raises UsageError for options that do not go together."""
        plain_text = self.kind == TEXT and not self.ids
        for name, given, fits in (
            ("--window", self.window is not None, plain_text or self.kind == PAIRS),
            ("--stride", self.stride is not None, plain_text),
            ("--documents", self.documents, plain_text),
        ):
            if given and not fits:
                source = "--ids" if self.ids else f"--{self.kind}"
                raise UsageError(f"{name} does nothing with {source}", hint=f"leave {name} out")
        if self.documents and self.stride is not None:
            raise UsageError(
                "--stride with --documents: documents are read from their beginning only",
                hint="leave one of the two out",
            )


def request_of(
    text: Path | None,
    pairs: Path | None,
    images: Path | None,
    *,
    window: int | None = None,
    samples: int | None = None,
) -> Request | None:
    """The one request of --eval-text, --eval-pairs and --eval-images, None where none is given."""
    given = [
        (kind, path)
        for kind, path in (("text", text), ("pairs", pairs), ("images", images))
        if path is not None
    ]
    if len(given) > 1:
        raise UsageError(
            f"--eval-{given[0][0]} and --eval-{given[1][0]}: a model is evaluated on one of them",
            hint="give one here, and use compress eval for the other",
        )
    if not given:
        if window is not None or samples is not None:
            raise UsageError(
                "--eval-window and --eval-samples need data", hint="add --eval-text FILE"
            )
        return None
    kind, path = given[0]
    ids = kind == TEXT and path.suffix.lower() == ".npy"
    request = Request(kind, path, ids=ids, window=window, samples=samples)
    try:
        request.validate()
    except UsageError as error:
        raise UsageError(f"--eval{error.message[1:]}", hint=error.hint) from error
    return request


@dataclass(frozen=True)
class TextData:
    """Sequences of a decoder."""

    windows: tuple[Window, ...]
    record: Mapping[str, Any]

    @cached_property
    def inputs(self) -> list[dict[str, Array]]:
        """What a model is called with, sequence by sequence; the same list each time."""
        return [{IDS: window.ids[None]} for window in self.windows]

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return sum(window.scored for window in self.windows)


@dataclass(frozen=True)
class PairData:
    """Sentence pairs: token ids [length] of the first and of the second of each, and scores."""

    first: tuple[NDArray[np.int64], ...]
    second: tuple[NDArray[np.int64], ...]
    scores: NDArray[np.float64]
    record: Mapping[str, Any]

    @cached_property
    def sentences(self) -> list[dict[str, Array]]:
        """All sentences, the first ones and then the second ones, with an attention mask."""
        return [
            {IDS: ids, "attention_mask": np.ones_like(ids)} for ids in (*self.first, *self.second)
        ]


@dataclass(frozen=True)
class ImageData:
    """Images uint8 [n, height, width, channels] and labels [n]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    record: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> list[dict[str, Array]]:
        """Batches of images."""
        starts = range(0, len(self.images), IMAGE_BATCH)
        return [{"images": self.images[i : i + IMAGE_BATCH]} for i in starts]


Data = TextData | PairData | ImageData


def load_data(request: Request, model: Checkpoint) -> Data:
    """Read the data for a model, whose tokenizer and config are used.

    Raises UsageError for too little of it, InputError for content that does not fit the model.
    """
    request.validate()
    try:
        if request.kind == PAIRS:
            return _pairs(request, model)
        if request.kind == IMAGES:
            return _images(request)
        return _text(request, model)
    except UsageError as error:  # the same reader says --length where it calibrates
        hint = None if error.hint is None else error.hint.replace("--length", "--window")
        raise UsageError(error.message, hint=hint) from error


def same_data(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two records of data (`Inputs.record`, `Data.record`) speak of the same file or ids.

    A model that was calibrated on what it is judged on looks better than it is.
    """
    return any(a.get(key) is not None and a.get(key) == b.get(key) for key in _DIGESTS)


_DIGESTS = ("file_sha256", "digest")


def _text(request: Request, model: Checkpoint) -> TextData:
    if request.stride is not None:
        return _strided(request, model, request.stride)
    if request.ids:
        read = samples_of.read_ids(request.path, model.config, samples=request.samples)
    else:
        read = text_data.text_ids(
            request.path,
            model,
            length=request.window,
            samples=request.samples,
            documents=request.documents,
        )
    windows = tuple(w for w in apart(read) if w.scored)
    if not windows:
        raise UsageError(
            f"{show(str(request.path))}: sequences of one token, nothing to predict",
            hint="give sequences of at least 2 tokens",
        )
    length = int(read.lengths.max()) if request.ids else read.settings["length"]
    record = {
        "file": request.path.name,
        "file_sha256": read.file_sha256,
        "digest": read.digest,
        "kind": read.kind,
        "window": length,
        "stride": None,
    }
    return _counted(windows, record)


def _strided(request: Request, model: Checkpoint, stride: int) -> TextData:
    stream = text_data.text_stream(request.path, model, length=request.window)
    ids = stream.ids.astype(np.int64)
    windows = overlapping(ids, stream.before, stream.length, stride)[: request.samples]
    record = {
        "file": request.path.name,
        "file_sha256": stream.file_sha256,
        "kind": "text",
        "window": stream.length,
        "stride": stride,
    }
    return _counted(tuple(windows), record)


def _counted(windows: tuple[Window, ...], record: dict[str, Any]) -> TextData:
    counts = {"windows": len(windows), "tokens_scored": sum(w.scored for w in windows)}
    return TextData(windows, record | counts)


def _pairs(request: Request, model: Checkpoint) -> PairData:
    first, second, scores = text_data.read_pairs(request.path)
    most = request.samples
    first, second, scores = first[:most], second[:most], scores[:most]
    if len(scores) < 2:
        raise UsageError(
            f"{show(str(request.path))}: {len(scores)} sentence pair, a correlation needs two",
            hint="give more pairs",
        )
    if (scores == scores[0]).all():
        raise UsageError(
            f"{show(str(request.path))}: every pair has the score {scores[0]:g}, so no order can be"
            " compared",
            hint="give pairs with different scores",
        )
    rows = text_data.list_ids([*first, *second], model, request.window)
    ids = tuple(np.asarray(row, np.int64) for row in rows)
    if empty := [n for n, row in enumerate(ids) if not row.size]:
        raise InputError(
            f"{show(str(request.path))}: a sentence of pair {empty[0] % len(scores) + 1} has no"
            " tokens",
            hint="leave that pair out",
        )
    _check_ids(ids, model, str(request.path))
    record = {
        "file": request.path.name,
        "file_sha256": samples_of.file_sha256(request.path),
        "kind": "pairs",
        "pairs": len(scores),
        "window": request.window,
        "pooling": "mean",
    }
    return PairData(ids[: len(scores)], ids[len(scores) :], scores, record)


def _check_ids(ids: tuple[NDArray[np.int64], ...], model: Checkpoint, where: str) -> None:
    rows = [row.tolist() for row in ids]
    made = samples_of.Inputs("sentences", {IDS: samples_of.stack(rows)}, "", "")
    samples_of.check_vocabulary(made, samples_of.vocabulary_of(model.config), where)


def _images(request: Request) -> ImageData:
    read = samples_of.read_images(request.path, samples=request.samples)
    labels = read.arrays.get(samples_of.LABELS)
    if labels is None:
        raise InputError(
            f"{show(str(request.path))}: no array named labels, so there is no accuracy",
            hint="store the class of each image, counted from 0, as `labels`",
        )
    record = {
        "file": request.path.name,
        "file_sha256": read.file_sha256,
        "digest": read.digest,
        "kind": "images",
        "images": read.samples,
        "shape": list(read.arrays[samples_of.IMAGES].shape[1:]),
    }
    return ImageData(read.arrays[samples_of.IMAGES], labels, record)
