"""`compress.load`: an output of this tool as a transformers model whose weights stay packed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoint import Checkpoint, strict_json
from compress.errors import InputError, UsageError, show
from compress.kernels import products
from compress.output import CompressedCheckpoint, open_any
from compress.runtime.architecture import build, require_transformers
from compress.runtime.modules import CompressedEmbedding, CompressedLinear, use_dense_kernels
from compress.runtime.packed import is_packable, is_table, pack_tensor
from compress.runtime.renaming import renaming_of
from compress.runtime.slots import Slot, find_slots, persistent_buffers
from compress.tensor import Array, TensorInfo
from compress.tensor import Tensor as Weights

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "F32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16, "F16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "BF16": torch.bfloat16,
}  # fmt: skip
_MAX_JSON = 1 << 20
_GENERATION = "generation_config.json"
# Ends of names that checkpoints use and transformers' models do not: of BERT's time, GPT-NeoX's.
_OLD_NAMES = (
    (".gamma", ".weight"),
    (".beta", ".bias"),
    ("embed_out.weight", "lm_head.weight"),
)


def load(
    path: str | Path,
    *,
    precision: str = "exact",
    dtype: torch.dtype | str | None = None,
    threads: int | None = None,
    dense_kernels: bool = True,
) -> Any:
    """The transformers model in `path`, ready for inference on the CPU.

    path       an output of this tool in any format, or a plain checkpoint
    precision  "exact" or "fast", of the products with codes (compress/kernels/products.py)
    dtype      of activations and of weights that are not packed: a torch dtype or its name;
               None is the checkpoint's own
    threads    passed to `torch.set_num_threads`, which the products obey; None leaves it
    dense_kernels   whether plain Linear weights of 16 bits are multiplied by our kernel at small
               batches; False leaves them to torch

    Linear layers with codes or a bitmask become `CompressedLinear`, tables with codes
    `CompressedEmbedding`, other Linear layers of 16 bits `DenseLinear`; all else is decoded
    (docs/runtime.md). Weights are read one tensor at a time. Raises UsageError
    where transformers is missing or an argument is wrong, InputError where the checkpoint does not
    fit the model that its config.json names.
    """
    if precision not in products.PRECISIONS:
        raise UsageError(
            f"precision {show(repr(precision))}: unknown", hint='use "exact" or "fast"'
        )
    wanted = _named_dtype(dtype) if isinstance(dtype, str) else dtype
    if wanted is not None and wanted not in DTYPES.values():
        raise UsageError(f"dtype {wanted}: not float32, float16 or bfloat16")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be positive, not {threads}")
    require_transformers()
    with open_any(path) as checkpoint:
        model = build(checkpoint.config, wanted or _own_dtype(checkpoint), str(path))
        WeightLoader(checkpoint, model, precision).run()
        if dense_kernels:
            use_dense_kernels(model)
        _add_generation_config(checkpoint, model)
    if threads is not None:
        torch.set_num_threads(threads)
    return model


def _named_dtype(name: str) -> torch.dtype:
    found = DTYPES.get(name.removeprefix("torch."))
    if found is None:
        raise UsageError(f"dtype {show(name)}: unknown", hint="use float32, float16 or bfloat16")
    return found


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What `--untouched` stored, else what the config says, else the first tensor's."""
    config = checkpoint.config or {}
    stored = next(iter(checkpoint.rounded.values()), None)
    for name in (stored, config.get("dtype"), config.get("torch_dtype")):
        if isinstance(name, str) and name in DTYPES:
            return DTYPES[name]
    found = (DTYPES.get(info.dtype) for info in checkpoint.infos())
    return next((dtype for dtype in found if dtype is not None), torch.float32)


class WeightLoader:
    """Fills a model whose parameters are on the meta device, one stored tensor at a time.

    precision  of products with packed weights; None decodes every weight
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, precision: str | None) -> None:
        self.checkpoint, self.model, self.precision = checkpoint, model, precision
        self.slots = find_slots(model)
        self.buffers = persistent_buffers(model)
        self._renamed = renaming_of(model)
        self.targets = {i.name: self._name_in_model(i.name) for i in checkpoint.infos()}
        self.stored = {target: name for name, target in self.targets.items()}

    def run(self) -> None:
        """Fill every parameter and buffer that the checkpoint holds. Raises InputError."""
        for info in self.checkpoint.infos():
            self.fill(info)
        self.require(n for n, p in self.model.named_parameters() if p.is_meta)

    def fill(self, info: TensorInfo) -> None:
        """Fill the places of one stored tensor; one that the model has no place for is left."""
        target = self.targets[info.name]
        if target in self.buffers:
            self._fill_buffer(info, self.buffers[target])
        elif target in self.slots:
            self._fill(info, self._places(info.name, target))

    def require(self, names: Iterable[str]) -> None:
        """Raises InputError that names the first of these parameters, which are not stored."""
        missing = list(names)
        if missing:
            raise InputError(
                f"{show(str(self.checkpoint.path))}: {len(missing)} weights of"
                f" {type(self.model).__name__} are not there, the first is {show(missing[0])}",
                hint="`architectures` in config.json must name the class that the weights are of;"
                " where transformers renames weights, use compress unpack and from_pretrained",
            )

    def source(self, slot: Slot) -> TensorInfo | None:
        """The stored tensor that fills a place, None where there is none.

        It is the place's own tensor, else that of a place tied to it. Raises InputError where its
        shape is not the place's.
        """
        names = [slot.name, *sorted(tied.name for tied in self.slots[slot.name])]
        found = next((self._sources[name] for name in names if name in self._sources), None)
        if found is None:
            return None
        info = self.checkpoint.info(found)
        if info.shape != tuple(slot.own.shape):
            raise _misfit(info, slot.own)
        return info

    @cached_property
    def _sources(self) -> dict[str, str]:
        """The stored tensor that a name of the model has or is an alias of."""
        aliases = self.checkpoint.aliases.items()
        return {self._name_in_model(alias): kept for alias, kept in aliases} | self.stored

    def _name_in_model(self, name: str) -> str:
        """The name that the model has for a stored tensor (itself where it has none)."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        written = [name.removesuffix(old) + new for old, new in _OLD_NAMES if name.endswith(old)]
        for plain in (name, *written, self._renamed(name)):
            for candidate in (plain, prefix + plain, plain.removeprefix(prefix)):
                if candidate in self.slots or candidate in self.buffers:
                    return candidate
        return name

    def _places(self, name: str, target: str) -> list[Slot]:
        """Where a stored tensor goes: its own place, and tied ones that have no tensor."""
        names = [s.name for s in self.slots[target]]
        aliases = self.checkpoint.aliases.items()
        names += [self._name_in_model(alias) for alias, kept in aliases if kept == name]
        free = {n for n in names if n in self.slots and (n == target or n not in self.stored)}
        return [s for n in sorted(free) for s in self.slots[n] if s.name == n]

    def _fill(self, info: TensorInfo, places: list[Slot]) -> None:
        checkpoint = self.checkpoint
        if (
            self.precision is None
            or not isinstance(checkpoint, CompressedCheckpoint)
            or info.name not in checkpoint.entries
        ):
            self._fill_dense(info, checkpoint.read(info), places)
            return
        weights = checkpoint.tensor(info.name)
        if _takes_packed(weights, places):
            self._fill_packed(weights, places)
        else:
            self._fill_dense(info, info.from_matrix(weights.decode()), places)

    def _fill_packed(self, weights: Weights, places: list[Slot]) -> None:
        """One buffer for all places, but for Linears that differ in their bias."""
        buffers: dict[str | None, torch.Tensor] = {}
        linears = [slot for slot in places if slot.kind is nn.Linear]
        for slot in linears:
            bias = self._bias_of(slot)
            if bias not in buffers:
                values = None if bias is None else self._read_bias(bias)
                buffers[bias] = torch.from_numpy(pack_tensor(weights, values))
            precision = self.precision or "exact"
            slot.replace(CompressedLinear(buffers[bias], precision, slot.own.dtype))
        for slot in places:
            if slot.kind is nn.Embedding:
                packed = next(iter(buffers.values()), None)
                if packed is None:
                    packed = buffers[None] = torch.from_numpy(pack_tensor(weights))
                slot.replace(CompressedEmbedding(packed, slot.own.dtype))

    def _bias_of(self, slot: Slot) -> str | None:
        """The stored tensor that is a Linear's bias, None where it has none."""
        if slot.module._parameters.get("bias") is None:
            return None
        name = slot.name.removesuffix("weight") + "bias"
        for tied in self.slots[name]:
            if tied.name in self.stored:
                return self.stored[tied.name]
        raise InputError(f"{show(str(self.checkpoint.path))}: {show(name)} is not there")

    def _read_bias(self, name: str) -> Array:
        info = next(i for i in self.checkpoint.infos() if i.name == name)
        return self.checkpoint.read(info).reshape(-1)

    def _fill_dense(self, info: TensorInfo, values: Array, places: list[Slot]) -> None:
        """Plain values in the dtype that the model was built with; tied places share them."""
        param: nn.Parameter | None = None
        for slot in places:
            if slot.own.shape != values.shape:
                raise _misfit(info, slot.own)
            if param is None:
                own = slot.own
                tensor = _as_torch(values)
                kept = tensor.to(own.dtype) if own.is_floating_point() else tensor
                param = nn.Parameter(kept, requires_grad=False)
            slot.module._parameters[slot.attribute] = param

    def _fill_buffer(self, info: TensorInfo, buffer: torch.Tensor) -> None:
        values = _as_torch(self.checkpoint.read(info))
        if values.numel() != buffer.numel():
            raise _misfit(info, buffer)
        buffer.copy_(values.reshape(buffer.shape))


def _takes_packed(weights: Weights, places: list[Slot]) -> bool:
    """Whether every place of a tensor can hold a packed module."""
    kinds = {slot.kind for slot in places}
    if not is_packable(weights) or not kinds <= {nn.Linear, nn.Embedding}:
        return False
    fits = all(tuple(slot.own.shape) == weights.info.shape for slot in places)
    return fits and (nn.Embedding not in kinds or is_table(weights))


def _misfit(info: TensorInfo, own: torch.Tensor) -> InputError:
    return InputError(
        f"tensor {show(info.name)} has the shape {list(info.shape)}, but the model that"
        f" config.json describes wants {list(own.shape)}",
        hint="config.json must be the one that the weights were trained with",
    )


def _as_torch(values: Array) -> torch.Tensor:
    """The array's memory as a tensor."""
    values = np.ascontiguousarray(values)
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    if values.dtype.name.startswith("float8"):
        return torch.from_numpy(values.astype(np.float32))
    return torch.from_numpy(values)


def _add_generation_config(checkpoint: Checkpoint, model: Any) -> None:
    """What generation_config.json says (end tokens above all), where there is one."""
    if _GENERATION not in checkpoint.sidecars or not model.can_generate():
        return
    file = checkpoint.open_sidecar(_GENERATION)
    try:
        fields = strict_json.parse(file.read_all(_MAX_JSON), _GENERATION, floats=True)
    finally:
        file.close()
    if not isinstance(fields, dict):
        raise InputError(f"{_GENERATION}: not a JSON object")
    try:
        model.generation_config = require_transformers().GenerationConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{_GENERATION}: {show(str(error), 200)}") from error
