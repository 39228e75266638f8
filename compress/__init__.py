"""`compress`: make model checkpoints smaller, and prove what that cost."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# From 1.29 on onnxruntime reports models and their hashes to its makers and keeps a device number
# under HOME, unless this is set before it is imported. Nothing of ours opens a connection.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from compress.runtime.loading import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`compress.load`, which needs torch, is imported when it is first asked for."""
    if name == "load":
        from compress.runtime.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
