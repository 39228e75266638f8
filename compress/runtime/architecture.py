"""A transformers model built from a config: its parameters take no memory, its buffers are real.

Building on the meta device would lose what modules compute when they are built (rotary
frequencies, position numbers). So each parameter goes to the meta device as soon as its module
registers it, before its initialization would touch its memory.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.checkpoint.config import strip_code_keys
from compress.errors import InputError, UsageError, show
from compress.runtime.slots import persistent_buffers

_BUILDING = threading.Lock()


def require_transformers() -> Any:
    """The module transformers. Raises UsageError that says how to install it."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UsageError(
            f"running a model needs the package {error.name}",
            hint="pip install 'compress-checkpoints[hf]'",
        ) from None
    return transformers


def build(raw: Mapping[str, Any] | None, dtype: torch.dtype, where: str) -> Any:
    """The model of a config.json, in eval mode, with parameters of `dtype` on the meta device.

    What the class wants in float32 at every `dtype` (`_keep_in_fp32_modules`) is in float32.

    The class is the first of `architectures` that transformers itself has; code that lies beside
    a checkpoint is never run. Raises InputError where the config names no such class.
    """
    transformers = require_transformers()
    if raw is None:
        raise InputError(
            f"{show(where)}: no config.json, so the model's architecture is unknown",
            hint="only checkpoints of transformers' models can be run",
        )
    config = _config(transformers, raw, where)
    cls = _model_class(transformers, config, raw, where)
    with _BUILDING, _parameters_on_meta():
        try:
            model = cls._from_config(config, dtype=dtype)
        except (
            ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError,
        ) as error:  # fmt: skip
            raise InputError(
                f"{show(where)}: {cls.__name__} cannot be built from config.json:"
                f" {show(str(error), 200)}"
            ) from error
    _keep_float32(model, dtype)
    return model.eval().requires_grad_(False)


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Follow the class's plan of dtypes, whose names are searched for as transformers does."""
    if not hasattr(model, "_get_dtype_plan"):  # an older transformers
        return
    plan = model._get_dtype_plan(dtype)
    parts = [name.replace("*", ".*") for name, kept in plan.items() if kept == torch.float32]
    if not parts:
        return
    named = re.compile("|".join(parts))
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
        if tensor.is_floating_point() and named.search(name):
            tensor.data = tensor.data.float()


def _config(transformers: Any, raw: Mapping[str, Any], where: str) -> Any:
    fields = strip_code_keys(dict(raw))
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in transformers.CONFIG_MAPPING:
        raise InputError(
            f"{show(where)}: model_type {show(str(name))} is unknown to transformers"
            f" {transformers.__version__}",
            hint="a newer transformers may know it; code beside a checkpoint is never run",
        )
    try:
        return transformers.CONFIG_MAPPING[name].from_dict(fields)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{show(where)}: config.json: {show(str(error), 200)}") from error


def _model_class(transformers: Any, config: Any, raw: Mapping[str, Any], where: str) -> Any:
    named = raw.get("architectures")
    for name in named if isinstance(named, list) else []:
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    if type(config) in transformers.MODEL_MAPPING:
        return transformers.MODEL_MAPPING[type(config)]
    raise InputError(
        f"{show(where)}: transformers {transformers.__version__} has no class for the"
        f" architectures {show(str(named))}",
        hint="code beside a checkpoint is never run",
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    original = nn.Module.register_parameter
    builder = threading.get_ident()

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        ours = threading.get_ident() == builder  # other threads may build modules of their own
        if ours and param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
