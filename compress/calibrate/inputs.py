"""What a model is given to calibrate or to be judged on: token ids or images, and their batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.calibrate.given_files import cannot_read, open_given, read_npy, read_npz
from compress.errors import InputError, UsageError, show
from compress.tensor import Array

IDS, IMAGES, LABELS = "input_ids", "images", "labels"
NO_TOKEN = -1  # beyond the end of a sample that is shorter than the longest
HELD_OUT_EVERY = 5
_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Inputs:
    """Samples for one model, in order.

    kind         "text", "documents", "sentences", "ids" or "images"
    arrays       `input_ids` int32 [samples, longest], -1 beyond the end of a shorter sample;
                 or `images` uint8 [samples, height, width, channels], perhaps `labels` [samples]
    description  one line for people
    file_sha256  of the file they come from
    settings     how they were taken from it (JSON types)
    """

    kind: str
    arrays: Mapping[str, Array]
    description: str
    file_sha256: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(next(iter(self.arrays.values())))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample; 1 for an image."""
        return lengths_of(self.arrays)

    @property
    def tokens(self) -> int:
        """Tokens of all samples; the number of images."""
        return int(self.lengths.sum())

    @property
    def digest(self) -> str:
        """SHA-256 of the arrays."""
        digest = hashlib.sha256()
        for name, values in sorted(self.arrays.items()):
            digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """What the statistics file and reports say of them."""
        return {
            "kind": self.kind,
            "digest": self.digest,
            "file_sha256": self.file_sha256,
            "samples": self.samples,
            "tokens": self.tokens,
            "settings": dict(self.settings),
        }

    def ids(self, sample: int) -> NDArray[np.int32]:
        """The token ids of one sample."""
        row: NDArray[np.int32] = self.arrays[IDS][sample]
        return row[row >= 0]

    def batches(
        self, tokens: int = 4096, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """Sample numbers and their arrays, by equal length, so that no padding exists.

        tokens   of a batch at most (at least one sample); images count one each
        numbers  only these samples; all by default
        `input_ids` come as int64, which models take. Order: by length, then by number.
        """
        return batches_of(self.arrays, tokens, numbers)


def lengths_of(arrays: Mapping[str, Array]) -> NDArray[np.int64]:
    """Tokens of each sample; 1 for an image."""
    if IDS not in arrays:
        return np.ones(len(next(iter(arrays.values()))), np.int64)
    lengths: NDArray[np.int64] = (arrays[IDS] >= 0).sum(axis=1)
    return lengths


def batches_of(
    arrays: Mapping[str, Array], tokens: int = 4096, numbers: Sequence[int] | None = None
) -> Iterator[tuple[list[int], dict[str, Array]]]:
    """`Inputs.batches` of bare arrays, as a statistics file keeps them."""
    lengths = lengths_of(arrays)
    by_length: dict[int, list[int]] = {}
    for number in range(len(lengths)) if numbers is None else numbers:
        by_length.setdefault(int(lengths[number]), []).append(number)
    for length, members in sorted(by_length.items()):
        step = max(1, tokens // max(1, length))
        for start in range(0, len(members), step):
            chosen = members[start : start + step]
            batch = {name: values[chosen] for name, values in arrays.items()}
            if IDS in batch:
                batch[IDS] = batch[IDS][:, :length].astype(np.int64)
            yield chosen, batch


def split(samples: int) -> tuple[list[int], list[int]]:
    """Numbers of the samples to learn from, and of those kept apart: every fifth, at least one.

    One sample alone is not split.
    """
    held = list(range(HELD_OUT_EVERY - 1, samples, HELD_OUT_EVERY))
    if not held and samples >= 2:
        held = [samples - 1]
    apart = set(held)
    return [n for n in range(samples) if n not in apart], held


def stack(rows: Sequence[Sequence[int] | Array]) -> NDArray[np.int32]:
    """Token ids of samples as one array, shorter ones filled with -1."""
    made = np.full((len(rows), max(len(row) for row in rows)), NO_TOKEN, np.int32)
    for number, row in enumerate(rows):
        made[number, : len(row)] = row
    return made


def draw(available: int, wanted: int, seed: int | None) -> list[int]:
    """Which of `available` samples to take: the first ones, or drawn by seed, in order."""
    if wanted >= available:
        return list(range(available))
    if seed is None:
        return list(range(wanted))
    return sorted(np.random.default_rng(seed).choice(available, wanted, replace=False).tolist())


def check_vocabulary(inputs: Inputs, vocabulary: int | None, where: str) -> None:
    """Refuse (InputError) an id that the model has no embedding for."""
    ids = inputs.arrays[IDS]
    if vocabulary is None or ids.max() < vocabulary:
        return
    sample, place = (int(i) for i in np.argwhere(ids >= vocabulary)[0])
    raise InputError(
        f"{show(where)}: token id {ids[sample, place]:,} (sample {sample}, place {place}) is out of"
        f" the model's vocabulary of {vocabulary:,}",
        hint="the tokenizer that made the ids is another model's",
    )


def vocabulary_of(config: Mapping[str, Any] | None) -> int | None:
    """Entries of the model's token table as config.json says, None where it does not."""
    return _number(config, ("vocab_size",))


def positions_of(config: Mapping[str, Any] | None) -> int | None:
    """The longest sample that the model takes as config.json says, None where it does not."""
    found = _number(config, ("max_position_embeddings", "n_positions"))
    body = config or {}
    if found is not None and body.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        padding = body.get("pad_token_id")  # positions are counted from behind it
        found -= 1 + (padding if isinstance(padding, int) else 1)
    return found


def read_ids(
    path: Path, config: Mapping[str, Any] | None, *, samples: int | None = None,
    seed: int | None = None,
) -> Inputs:  # fmt: skip
    """Token ids from an .npy file: integers [samples, length].

    Raises UsageError or InputError for another dtype or shape, and for ids that the model of
    `config` does not have.
    """
    values = read_npy(path)
    if values.dtype.kind not in "iu" or values.ndim != 2 or not values.size:
        raise InputError(
            f"{show(str(path))}: {values.dtype} {list(values.shape)}, not integers [samples,"
            " length]",
            hint="one row a sample, all of one length",
        )
    if values.min() < 0 or values.max() > np.iinfo(np.int32).max:
        value = int(values.min() if values.min() < 0 else values.max())
        sample = int(np.argwhere(values == value)[0][0])
        raise InputError(f"{show(str(path))}: token id {value} (sample {sample}) is no token")
    check_length(values.shape[1], config, str(path))
    chosen = draw(len(values), samples or len(values), seed)
    made = Inputs(
        "ids",
        {IDS: values[chosen].astype(np.int32)},
        f"{len(chosen)} x {values.shape[1]} token ids of {path.name}",
        file_sha256(path),
        {"samples": samples, "seed": seed},
    )
    check_vocabulary(made, vocabulary_of(config), str(path))
    return made


def check_length(length: int, config: Mapping[str, Any] | None, where: str) -> None:
    """Refuse (UsageError) samples that are longer than the model's positions."""
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise UsageError(
            f"{show(where)}: samples of {length} tokens, but the model has {positions} positions",
            hint=f"use at most --length {positions}",
        )


def read_images(path: Path, *, samples: int | None = None, seed: int | None = None) -> Inputs:
    """Images from an .npz file: `images` uint8 [n, height, width, channels], perhaps `labels` [n].

    Raises InputError for anything else.
    """
    arrays, names = read_npz(path, (IMAGES, LABELS))
    where = show(str(path))
    if IMAGES not in arrays:
        raise InputError(
            f"{where}: no array named images", hint=f"it holds {show(', '.join(sorted(names)))}"
        )
    images, labels = arrays[IMAGES], arrays.get(LABELS)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in _CHANNELS:
        raise InputError(
            f"{where}: images are {images.dtype} {list(images.shape)}, not uint8 [n, height,"
            " width, channels]",
            hint="channels come last and are 1, 3 or 4; values are 0 to 255",
        )
    if not images.size:
        raise InputError(f"{where}: no images in it")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise InputError(
            f"{where}: labels are {labels.dtype} {list(labels.shape)}, not {len(images)} integers"
        )
    chosen = draw(len(images), samples or len(images), seed)
    kept = {IMAGES: np.ascontiguousarray(images[chosen])}
    if labels is not None:
        kept[LABELS] = labels[chosen].astype(np.int64)
    shape = "x".join(str(n) for n in images.shape[1:])
    return Inputs(
        "images",
        kept,
        f"{len(chosen)} images of {shape} of {path.name}",
        file_sha256(path),
        {"samples": samples, "seed": seed},
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file. Raises as `compress.calibrate.given_files.open_given` does."""
    digest = hashlib.sha256()
    with open_given(path) as file:
        try:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        except OSError as error:
            raise cannot_read(error, path) from error
    return digest.hexdigest()


def _number(config: Mapping[str, Any] | None, names: Sequence[str]) -> int | None:
    body: Mapping[str, Any] = config or {}
    inner = body.get("text_config")
    for part in (body, inner if isinstance(inner, Mapping) else {}):
        for name in names:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None
