"""The tokenizer beside a model, as its makers stored it; no code beside it is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.errors import InputError, show
from compress.runtime.architecture import require_transformers

_NAMES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
    "spiece.model",
)  # fmt: skip


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a directory. Raises InputError where there is none or it does not load."""
    transformers = require_transformers()
    if not any((path / name).is_file() for name in _NAMES):
        raise InputError(
            f"{show(str(path))}: no tokenizer",
            hint="copy the model's tokenizer.json and tokenizer_config.json there",
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"{show(str(path))}: the tokenizer does not load: {show(str(error), 200)}"
        ) from error
