"""`config.json` as data: parsed strictly, its sizes bounded, its requests to run code ignored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.checkpoint import strict_json
from compress.checkpoint.files import InputFile, open_typed
from compress.errors import InputError, show

MAX_CONFIG = 16_000_000
MAX_SIZE = 10_000_000
MAX_POSITIONS = 1_000_000_000

# Fields that are one positive integer wherever they appear.
_SIZES = frozenset(
    {"hidden_size", "d_model", "n_embd", "num_hidden_layers", "n_layer", "vocab_size"}
)
# Fields that some architectures write as a list with one integer a layer, or as 0 for none.
_COUNTS = frozenset({
    "intermediate_size", "num_attention_heads", "num_key_value_heads", "n_head", "head_dim",
    "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "d_ff", "num_layers", "num_heads", "type_vocab_size",
})  # fmt: skip
_POSITIONS = frozenset({"max_position_embeddings", "n_positions", "sliding_window"})

_CODE_KEYS = frozenset({
    "auto_map", "_attn_implementation_internal", "_experts_implementation_internal",
    "trust_remote_code", "custom_pipelines",
})  # fmt: skip
# A kernel of the hub is named like a repository: "owner/name".
_REPOSITORY = re.compile(r"[^/\s]+/[^/\s]+")


def read_config(path: str | Path, *, allow_quantized: bool = False) -> dict[str, Any]:
    """Read and check a lone `config.json`. Raises UsageError, InputError."""
    file = open_typed(Path(path))
    try:
        return parse_config(file, allow_quantized=allow_quantized)[0]
    finally:
        file.close()


def parse_config(file: InputFile, *, allow_quantized: bool = False) -> tuple[dict[str, Any], bytes]:
    """The checked config and the bytes it was read from. Raises InputError."""
    raw = file.read_all(MAX_CONFIG)
    config = strict_json.parse(raw, file.name, floats=True)
    if not isinstance(config, dict):
        raise InputError(f"{show(file.name)}: not a JSON object")
    check_config(config, file.name, allow_quantized=allow_quantized)
    return config, raw


def check_config(config: dict[str, Any], name: str, *, allow_quantized: bool = False) -> None:
    """Bound the known sizes at every level; refuse a model that is already quantized.

    Raises InputError naming `name` and the field.
    """
    where = show(name)
    for _, part in _walk(config):
        for key, value in part.items():
            _check_field(key, value, where)
        if part.get("quantization_config") is not None and not allow_quantized:
            raise InputError(
                f"{where}: quantization_config says that the weights are already quantized",
                hint="start from the original, unquantized checkpoint",
            )


def code_keys(config: dict[str, Any]) -> list[str]:
    """Dotted paths of the keys that ask a loader to run or fetch code."""
    return sorted(f"{path}{key}" for path, part in _walk(config) for key in _code_keys_of(part))


def strip_code_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A copy without the keys that `code_keys` lists."""
    clean = {
        key: _strip(value) for key, value in config.items() if key not in _code_keys_of(config)
    }
    return clean


def _strip(value: Any) -> Any:
    # Recursion is bounded: the parser refuses more than 64 levels.
    if isinstance(value, dict):
        return strip_code_keys(value)
    if isinstance(value, list):
        return [_strip(item) for item in value]
    return value


def _code_keys_of(part: dict[str, Any]) -> set[str]:
    found = set(part.keys() & _CODE_KEYS)
    attention = part.get("_attn_implementation")
    if isinstance(attention, str) and _REPOSITORY.fullmatch(attention):
        found.add("_attn_implementation")
    return found


def _walk(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of the config with its dotted path (ending in a dot, or empty)."""
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            yield path, value
            todo.extend((f"{path}{key}.", item) for key, item in value.items())
        elif isinstance(value, list):
            todo.extend((f"{path}{i}.", item) for i, item in enumerate(value))


def _check_field(key: str, value: Any, where: str) -> None:
    if value is None:
        return
    if key in _SIZES:
        good = _is_int(value, 1, MAX_SIZE)
    elif key in _COUNTS:
        items = value if isinstance(value, list) else [value]
        good = all(_is_int(item, 0, MAX_SIZE) for item in items)
    elif key in _POSITIONS:
        good = _is_int(value, -1, MAX_POSITIONS)
    else:
        return
    if not good:
        said = show(str(value)) if isinstance(value, str | int | float) else type(value).__name__
        raise InputError(f"{where}: {key} is {said}, not a sensible size")


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high
