"""What transformers calls the cache of a decoder: `past_key_values`, and `cache` from 5.24 on."""

from __future__ import annotations

import inspect
from typing import Any

NAMES = ("past_key_values", "cache")


def argument_of(model: Any) -> str | None:
    """The argument of a model's `forward` that takes the cache; None where it takes none."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in takes), None)


def of_output(output: Any) -> Any:
    """The cache in what `forward` returned; None where there is none."""
    found = (getattr(output, name, None) for name in NAMES)
    return next((cache for cache in found if cache is not None), None)
