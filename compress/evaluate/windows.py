"""Token ids cut into sequences, and how many tokens at the end of each are scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.calibrate.inputs import Inputs
from compress.errors import UsageError

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """One sequence that a model reads: `ids` [length], of which the last `scored` are scored.

    The first token of a sequence has nothing before it and is never scored.
    """

    ids: Ids
    scored: int


def apart(inputs: Inputs) -> list[Window]:
    """Samples that share no token: all but the first token of each is scored."""
    rows = (inputs.ids(n).astype(np.int64) for n in range(inputs.samples))
    return [Window(row, len(row) - 1) for row in rows]


def overlapping(stream: Ids, head: tuple[int, ...], length: int, stride: int) -> list[Window]:
    """Windows of `length` tokens over one text, each moved on by `stride` tokens of it.

    head  what the tokenizer puts before a text (its BOS), at the head of every window
    A token that an earlier window scored is context, and is not scored again. A rest that does not
    fill a window is left out. Raises UsageError where the text or the window is too short.
    """
    room = length - len(head)
    if room < 1 or not 1 <= stride <= room:
        raise UsageError(
            f"--stride {stride}: not from 1 to the {max(0, room)} tokens of text in a window",
            hint="a longer stride would leave tokens out",
        )
    if len(stream) < room:
        raise UsageError(
            f"the text is too short: {len(stream)} tokens, one window has {room}",
            hint="give more text, or a smaller --window",
        )
    windows = []
    for first in range(0, len(stream) - room + 1, stride):
        ids = np.concatenate([np.asarray(head, np.int64), stream[first : first + room]])
        new = room if first == 0 else stride
        windows.append(Window(ids, min(new, len(ids) - 1)))
    return windows
