"""A transformers model that is run with the weights of one block in memory at a time.

The model is built from its config on the meta device; code beside a checkpoint is never run. Its
blocks are the members of its one long `ModuleList`. What lies around them (embeddings, final norm,
head) is loaded when it is needed; token tables are never loaded, their rows are read.

    model = BlockModel(checkpoint)
    batches = [model.start({"input_ids": ids}) for ids in ...]      inputs of the first block
    for index in range(model.depth):
        with model.loaded(index) as block:                          weights of one block
            for batch in batches: model.advance(index, batch)
    outputs = [model.finish(batch) for batch in batches]            norm, head: the model's output
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoint import Checkpoint
from compress.errors import UsageError, show
from compress.runtime.architecture import build
from compress.runtime.loading import WeightLoader
from compress.tensor import TensorInfo


class _Stop(Exception):
    """Ends a forward pass behind the last block."""


@dataclass
class Batch:
    """Samples of one length on their way through the model.

    inputs  what the model is called with, e.g. input_ids [samples, length]
    hidden  [samples, length, hidden] that the next block reads
    calls   per block, the further arguments that the model calls it with
    """

    inputs: Mapping[str, torch.Tensor]
    hidden: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class BlockModel:
    """A model of a checkpoint (plain, compressed or on trial), in float32, block by block.

    prefix  of the blocks' modules, e.g. "model.layers"
    depth   how many there are
    Raises UsageError where the model has no single stack of blocks, InputError where checkpoint
    and config do not fit.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> None:
        where = str(checkpoint.path)
        self.checkpoint = checkpoint
        self.model = build(checkpoint.config, dtype, where)
        self.prefix, self.blocks = _stack(self.model, where)
        self.depth = len(self.blocks)
        self._members: list[nn.Module] = list(self.blocks)
        self._loader = WeightLoader(checkpoint, self.model, None)
        self._tuples = False  # whether blocks return their output in a tuple
        self._read_tables()
        self._inside, self._outside = self._sort()
        self._load_outside(head=False)

    # ------------------------------------------------------------ names

    def stored_name(self, parameter: str) -> str | None:
        """The name that the checkpoint has for a parameter, None where it has none."""
        return self._loader.stored.get(parameter)

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Modules of one block whose `weight` is a stored matrix, by the tensor's stored name."""
        return self._linears(self._members[index], f"{self.prefix}.{index}.")

    def outside_linears(self) -> dict[str, nn.Module]:
        """The same of modules that are in no block: a pooler, a head of its own, projections."""
        found = self._linears(self.model, "")
        inside = {module for member in self._members for module in member.modules()}
        return {name: module for name, module in found.items() if module not in inside}

    def _linears(self, root: nn.Module, prefix: str) -> dict[str, nn.Module]:
        found = {}
        for name, module in root.named_modules():
            weight = module._parameters.get("weight")
            stored = self.stored_name(f"{prefix}{name}.weight")
            tabular = isinstance(module, (nn.Embedding, _RowReader))
            if weight is not None and weight.ndim >= 2 and stored is not None and not tabular:
                found[stored] = module
        return found

    # ------------------------------------------------------------ running

    @torch.no_grad()
    def start(self, inputs: Mapping[str, torch.Tensor]) -> Batch:
        """Run what lies before the blocks."""
        catchers = [_Catcher(member) for member in self._members]
        catchers[-1].is_last = True
        with self._blocks_as(catchers), suppress(_Stop):
            self._call(inputs)
        calls = [(c.arguments, c.keywords) for c in catchers]
        hidden = catchers[0].hidden
        if hidden is None:
            raise UsageError(f"{show(str(self.checkpoint.path))}: its blocks are never called")
        return Batch(inputs, hidden, calls)

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """One block with its weights in memory."""
        for info in self._inside[index]:
            self._loader.fill(info)
        block = self._members[index]
        self._loader.require(
            f"{self.prefix}.{index}.{n}" for n, p in block.named_parameters() if p.is_meta
        )
        try:
            yield block
        finally:
            for module in block.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(
                            parameter.to("meta"), requires_grad=False
                        )

    def call_block(self, index: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """The output of a loaded block for a hidden state; gradients flow where they are on."""
        arguments, keywords = batch.calls[index]
        output = self._members[index](hidden, *arguments, **keywords)
        self._tuples = isinstance(output, tuple)
        return output[0] if self._tuples else output  # type: ignore[no-any-return]

    @torch.no_grad()
    def advance(self, index: int, batch: Batch) -> None:
        """Run a loaded block and keep its output as the batch's hidden state."""
        batch.hidden = self.call_block(index, batch, batch.hidden)

    def finish(self, batch: Batch, hidden: torch.Tensor | None = None) -> Any:
        """Run what lies behind the blocks: the model's own output for the hidden state."""
        self._load_outside(head=True)
        state = batch.hidden if hidden is None else hidden
        passing = [_Passing(m, state, self._tuples) for m in self._members]
        with self._blocks_as(passing):
            return self._call(batch.inputs)

    # ------------------------------------------------------------ inside

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        config = self.model.config
        extra = {"use_cache": False} if getattr(config, "use_cache", None) is not None else {}
        return self.model(**inputs, **extra)

    @contextmanager
    def _blocks_as(self, others: list[Any]) -> Iterator[None]:
        for index, other in enumerate(others):
            self.blocks._modules[str(index)] = other
        try:
            yield
        finally:
            for index, member in enumerate(self._members):
                self.blocks._modules[str(index)] = member

    def _read_tables(self) -> None:
        """Put modules that read rows in the place of token tables."""
        for name, module in list(self.model.named_modules()):
            if type(module) is not nn.Embedding or module.max_norm:
                continue
            stored = self.stored_name(f"{name}.weight")
            if stored is None:
                continue
            info = self.checkpoint.info(stored)
            if info.shape == tuple(module.weight.shape):
                outer, _, child = name.rpartition(".")
                parent = self.model.get_submodule(outer) if outer else self.model
                parent._modules[child] = _RowReader(self.checkpoint, info, module)

    def _sort(self) -> tuple[list[list[TensorInfo]], list[TensorInfo]]:
        """The stored tensors of each block, and those of no block."""
        inside: list[list[TensorInfo]] = [[] for _ in self._members]
        outside = []
        for info in self.checkpoint.infos():
            target = self._loader.targets[info.name]
            rest = target.removeprefix(f"{self.prefix}.")
            number = rest.partition(".")[0]
            if rest != target and number.isdecimal():
                inside[int(number)].append(info)
            else:
                outside.append(info)
        return inside, outside

    def _load_outside(self, *, head: bool) -> None:
        """What lies around the blocks; the head's matrix is large and waits until it is asked."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        pending = []
        for info in self._outside:
            target = self._loader.targets[info.name]
            owner = modules.get(target.rpartition(".")[0])
            places = [s.name for s in self._loader.slots.get(target, [])]
            is_head = any(_is_output(self.model, modules, place) for place in places)
            if isinstance(owner, _RowReader) and not is_head:
                continue
            if is_head and not head:
                pending.append(info)
            else:
                self._loader.fill(info)
        self._outside = pending
        if head:
            self._require_outside()

    def _require_outside(self) -> None:
        """Raises InputError for a weight around the blocks that the checkpoint does not hold."""
        readers = [m for m in self.model.modules() if isinstance(m, _RowReader)]
        read = {id(reader.weight) for reader in readers}
        self._loader.require(
            name
            for name, parameter in self.model.named_parameters()
            if parameter.is_meta
            and id(parameter) not in read
            and not name.startswith(f"{self.prefix}.")
        )


def _is_output(model: Any, modules: Mapping[str, nn.Module], parameter: str) -> bool:
    """Whether a parameter is the weight of the model's output embeddings."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return output is not None and modules.get(parameter.rpartition(".")[0]) is output


def _stack(model: Any, where: str) -> tuple[str, nn.ModuleList]:
    """The model's one list of blocks, with its name; each has to be run once (ALBERT's are not)."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    outermost = [
        (name, module)
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if len(outermost) != 1:
        raise UsageError(
            f"{show(where)}: {type(model).__name__} is no single stack of blocks"
            f" (it has {len(outermost)})",
            hint="calibrate an ONNX export of it, or use --module",
        )
    name, blocks = outermost[0]
    layers = getattr(model.config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(blocks):
        raise UsageError(
            f"{show(where)}: {type(model).__name__} runs its blocks several times"
            f" ({layers} layers, {len(blocks)} in {show(name)})",
            hint="calibrate an ONNX export of it, or use --module",
        )
    return name, blocks


class _Standin(nn.Module):
    """Stands for a block, and has the block's attributes: models ask for its kind of attention."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a submodule: its weights are not here

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class _Catcher(_Standin):
    """Remembers what a block is called with."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.hidden: torch.Tensor | None = None
        self.arguments: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}
        self.is_last = False

    def forward(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        rest = dict(keywords)
        hidden = arguments[0] if arguments else rest.pop("hidden_states")
        self.hidden, self.arguments, self.keywords = hidden, arguments[1:], rest
        if self.is_last:
            raise _Stop
        return hidden  # type: ignore[no-any-return]


class _Passing(_Standin):
    """Gives what a block's output is known to be."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor, in_tuple: bool) -> None:
        super().__init__(block)
        self.__dict__["state"] = hidden
        self.in_tuple = in_tuple

    def forward(self, *_: Any, **__: Any) -> Any:
        state = self.__dict__["state"]
        return (state,) if self.in_tuple else state


class _RowReader(nn.Module):
    """An embedding that reads the rows it needs from the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, info: TensorInfo, original: nn.Embedding) -> None:
        super().__init__()
        self.checkpoint, self.info = checkpoint, info
        self.weight = original.weight  # on the meta device; a tied head finds it here
        self.padding_idx = original.padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        unique, inverse = np.unique(ids.numpy(), return_inverse=True)
        rows = [self.checkpoint.read(self.info, int(i), int(i) + 1)[0] for i in unique]
        table = torch.from_numpy(np.stack(rows).astype(np.float32))
        return table[torch.from_numpy(inverse.reshape(ids.shape))].to(self.weight.dtype)
