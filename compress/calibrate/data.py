"""Text as token ids: windows of a stream, documents, sentences, with the model's own tokenizer.

Each sample begins with the tokenizer's own BOS where it has one, and has what the tokenizer puts
around a text where that is a pair such as CLS ... SEP. No sample is padded.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.calibrate.given_files import cannot_read, open_given
from compress.calibrate.inputs import (
    IDS,
    Inputs,
    check_length,
    check_vocabulary,
    draw,
    positions_of,
    stack,
    vocabulary_of,
)
from compress.checkpoint import Checkpoint
from compress.errors import InputError, UsageError, show

DEFAULT_LENGTH = 512
_MAX_TEXT = 1 << 28
_SHORTEST = 2  # a token and one to follow it


def text_ids(
    path: Path,
    model: Checkpoint,
    *,
    length: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    documents: bool = False,
) -> Inputs:
    """A UTF-8 text as windows of `length` token ids, BOS included; a rest that is shorter is left.

    length     512 by default, or as many as the model has positions
    samples    at most; all by default
    seed       draw the windows (kept in order); None takes the first ones
    documents  cut at blank lines instead: a sample a document, of its first `length` tokens
    Raises UsageError for a text that is too short, InputError for one that is no UTF-8, a missing
    tokenizer, or ids that the model does not have.
    """
    raw, text = _read(path)
    tokenizer = _Tokenizer(model)
    length = tokenizer.check(length, path)
    room = length - tokenizer.around
    rows: Sequence[Sequence[int] | NDArray[np.int32]]
    if documents:
        pieces = [piece.strip("\r\n") for piece in re.split(r"(?:\r?\n[ \t]*){2,}", text)]
        tokenized = tokenizer.encode([piece for piece in pieces if piece.strip()])
        kept = [ids[:room] for ids in tokenized if len(ids) + tokenizer.around >= _SHORTEST]
        rows = [tokenizer.wrap(kept[n]) for n in draw(len(kept), samples or len(kept), seed)]
        kind = "documents"
    else:
        stream = np.array(tokenizer.encode([text])[0], np.int32)
        count = len(stream) // room
        if not count:
            raise UsageError(
                f"{show(str(path))}: {len(stream):,} tokens; one sample of {length} needs {room:,}",
                hint="give more text, or a smaller --length",
            )
        numbers = draw(count, samples or count, seed)
        rows = [tokenizer.wrap(stream[n * room : (n + 1) * room].tolist()) for n in numbers]
        kind = "text"
    settings = {"length": length, "samples": samples, "seed": seed}
    return _finished(kind, rows, raw, path, model, settings)


@dataclass(frozen=True)
class Stream:
    """A whole text as token ids, before it is cut.

    ids     int32 [tokens], with nothing around them
    before  what the tokenizer puts before a text
    length  of a sample, checked against the model's positions
    """

    ids: NDArray[np.int32]
    before: tuple[int, ...]
    length: int
    file_sha256: str


def text_stream(path: Path, model: Checkpoint, *, length: int | None = None) -> Stream:
    """A UTF-8 text as one stream, for windows that overlap. Raises as `text_ids` does."""
    raw, text = _read(path)
    tokenizer = _Tokenizer(model)
    ids = np.array(tokenizer.encode([text])[0], np.int32)
    if not ids.size:
        raise UsageError(f"{show(str(path))}: 0 tokens", hint="give a text to read")
    whole = Inputs("text", {IDS: ids[None]}, "", "")
    check_vocabulary(whole, vocabulary_of(model.config), str(path))
    before = tokenizer.before
    return Stream(ids, before, tokenizer.check(length, path), hashlib.sha256(raw).hexdigest())


def sentence_ids(
    path: Path,
    model: Checkpoint,
    *,
    length: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
) -> Inputs:
    """Sentences as samples of their own lengths: the lines of a text, or both columns of a .csv.

    A sentence that was seen before is left out; one longer than `length` tokens is cut. Raises as
    `text_ids` does.
    """
    raw, text = _read(path)
    if path.suffix.lower() == ".csv":
        first, second, _ = parse_pairs(text, path)
        lines = [line for pair in zip(first, second, strict=True) for line in pair]
    else:
        lines = [line.strip() for line in text.splitlines()]
    distinct = [line for line in dict.fromkeys(lines) if line]
    chosen = [distinct[n] for n in draw(len(distinct), samples or len(distinct), seed)]
    tokenizer = _Tokenizer(model)
    rows = tokenizer.sentences(chosen, tokenizer.check(length, path))
    settings = {"length": length, "samples": samples, "seed": seed}
    return _finished("sentences", rows, raw, path, model, settings)


def list_ids(sentences: Sequence[str], model: Checkpoint, length: int | None = None) -> list[Any]:
    """Token ids of each of the sentences as they come, cut to `length`, for evaluation."""
    tokenizer = _Tokenizer(model)
    return tokenizer.sentences(sentences, tokenizer.check(length, Path("sentences")))


def read_pairs(path: Path) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Sentence pairs and their scores from a CSV of sentence1,sentence2,score without a header.

    Raises InputError that names the line.
    """
    return parse_pairs(_read(path)[1], path)


def parse_pairs(text: str, path: Path) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """`read_pairs` of a text that was read already."""
    first, second, scores = [], [], []
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        for row in filter(None, reader):
            if len(row) != 3:
                raise InputError(
                    f"{show(str(path))}, line {reader.line_num}: {len(row)} fields, not"
                    " sentence1,sentence2,score",
                    hint="quote sentences that hold a comma",
                )
            score = float(row[2])
            if not np.isfinite(score):
                raise ValueError
            first.append(row[0])
            second.append(row[1])
            scores.append(score)
    except csv.Error as error:
        raise InputError(
            f"{show(str(path))}, line {reader.line_num}: {show(str(error))}"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{show(str(path))}, line {reader.line_num}: {show(repr(row[2]))} is no score"
        ) from error
    if not first:
        raise InputError(f"{show(str(path))}: no sentence pairs in it")
    return first, second, np.array(scores)


@dataclass(frozen=True)
class _Around:
    """Ids before and behind a text."""

    before: tuple[int, ...]
    behind: tuple[int, ...]


class _Tokenizer:
    """The model's own tokenizer, and what it puts around a text."""

    def __init__(self, model: Checkpoint) -> None:
        from compress.runtime.architecture import require_transformers
        from compress.runtime.generate import quiet
        from compress.runtime.tokenizer import load_tokenizer

        if model.directory is None:
            raise InputError(
                f"{show(str(model.path))}: a lone file has no tokenizer",
                hint="name the model's directory, or give token ids with --ids",
            )
        quiet(require_transformers())
        self._own = load_tokenizer(model.directory)
        self._config = model.config
        self._ends = self._find_ends()
        self.around = len(self._ends.before) + len(self._ends.behind)

    @property
    def before(self) -> tuple[int, ...]:
        """Ids that come before a text."""
        return self._ends.before

    def check(self, length: int | None, path: Path) -> int:
        """The length of a sample. Raises UsageError where the model cannot take it."""
        longest = positions_of(self._config)
        if length is None:
            length = min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
        check_length(length, self._config, str(path))
        least = max(_SHORTEST, self.around + 1)
        if length < least:
            raise UsageError(f"samples of {length} tokens: too short", hint=f"at least {least}")
        return length

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids without anything around them."""
        if not texts:
            return []
        encoded = self._own(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def wrap(self, ids: Sequence[int]) -> list[int]:
        """A sample of these ids."""
        return [*self._ends.before, *ids, *self._ends.behind]

    def sentences(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """A sample a sentence, cut to `length`."""
        room = length - self.around
        return [self.wrap(ids[:room]) for ids in self.encode(list(texts))]

    def _find_ends(self) -> _Around:
        """CLS ... SEP where the tokenizer adds them, else its BOS, else nothing."""
        own = self._own
        inner = own("a", add_special_tokens=False)["input_ids"]
        whole = own("a")["input_ids"]
        before: list[int] = []
        behind: list[int] = []
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                before, behind = whole[:start], whole[start + len(inner) :]
                break
        if own.cls_token_id is not None and before[:1] == [own.cls_token_id]:
            return _Around(tuple(before), tuple(behind))
        if own.bos_token_id is not None:  # an end token that may follow would end each window
            return _Around((own.bos_token_id,), ())
        return _Around((), ())


def _finished(
    kind: str, rows: Sequence[Any], raw: bytes, path: Path, model: Checkpoint,
    settings: dict[str, Any],
) -> Inputs:  # fmt: skip
    if not rows:
        raise UsageError(
            f"{show(str(path))}: 0 samples in it; at least one of {_SHORTEST} tokens is needed",
            hint="give more text",
        )
    tokens = sum(len(row) for row in rows)
    made = Inputs(
        kind,
        {IDS: stack(rows)},
        f"{len(rows)} samples, {tokens:,} tokens of {path.name}",
        hashlib.sha256(raw).hexdigest(),
        settings,
    )
    check_vocabulary(made, vocabulary_of(model.config), str(path))
    return made


def _read(path: Path) -> tuple[bytes, str]:
    """The bytes and the text. Raises UsageError, InputError, ResourceError."""
    with open_given(path, pipes=True) as file:
        try:
            raw = file.read(_MAX_TEXT + 1)
        except OSError as error:
            raise cannot_read(error, path) from error
    if len(raw) > _MAX_TEXT:
        raise UsageError(
            f"{show(str(path))}: more than {_MAX_TEXT:,} bytes of text", hint="give a part of it"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{show(str(path))}: byte {error.start:,} is no UTF-8", hint="convert the text"
        ) from error
    if not text.strip():
        raise UsageError(
            f"{show(str(path))}: 0 tokens; the text is empty", hint="give a text to read"
        )
    return raw, text
