"""Engines of an evaluation: each runs one model over many inputs and yields one output a time.

    decoded   weights decoded to float32, one block of the model in memory at a time
    kernels   compress.load: packed weights, our products, the checkpoint's own dtype
    onnx      a .onnx file through onnxruntime (compress/evaluate/onnx_outputs.py)
    module    a user's own torch module

Inputs are what a model is called with: input_ids and perhaps attention_mask int64 [n, length], or
images as the data gives them. Outputs are logits, or the last hidden state of an encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.checkpoint import Checkpoint
from compress.engines.blocks import Batch, BlockModel
from compress.engines.module import UserModule
from compress.errors import InputError, UsageError, show
from compress.runtime.architecture import build
from compress.runtime.loading import WeightLoader, load
from compress.tensor import Array

Inputs = Mapping[str, Array]
Step = Callable[[], None]  # called after each piece of work, `steps` times in all

LOGITS, EMBEDDINGS = "logits", "last_hidden_state"
ENGINES = ("decoded", "kernels", "onnx", "module")
# Hidden states that are kept at once between two blocks; more sequences go in groups.
HELD_BYTES = 1 << 29


def no_step() -> None:
    """A progress callback that shows nothing."""


class Runner(ABC):
    """A model that is ready to run. `name` is the engine's."""

    name: str

    @abstractmethod
    def run(
        self, inputs: Sequence[Inputs], wanted: str = LOGITS, step: Step = no_step
    ) -> Iterator[torch.Tensor]:
        """The wanted output for each input, in order, made when it is asked for.

        Raises InputError where the model has no such output or cannot be run on the input.
        """

    @property
    def steps(self) -> int:
        """Calls of `step` for one input."""
        return 1

    def require_decoder(self) -> None:  # noqa: B027
        """Raises InputError where the model is known not to predict the next token."""

    def facts(self) -> dict[str, Any]:
        """Engine and versions, for the record."""
        return {"engine": self.name, "torch": torch.__version__}


class Decoded(Runner):
    """A transformers model of any checkpoint (plain, compressed, on trial), weights in float32.

    Models without a single stack of blocks are loaded whole.
    remember  keep the hidden states of the last inputs that were run, where they are few, so that
              running the same list again takes the head alone
    """

    name = "decoded"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._where = str(checkpoint.path)
        self.remember = False
        self._remembered: tuple[Sequence[Inputs], list[Any]] | None = None
        self._blocks: BlockModel | None = None
        try:
            self._blocks = BlockModel(checkpoint)
            self.model = self._blocks.model
        except UsageError:  # no single stack
            self.model = build(checkpoint.config, torch.float32, self._where)
            WeightLoader(checkpoint, self.model, None).run()

    @property
    def steps(self) -> int:
        """One a block, and one for what follows them."""
        return 1 if self._blocks is None else self._blocks.depth + 1

    def require_decoder(self) -> None:
        """Raises InputError where the model is known not to predict the next token."""
        require_decoder(self.model, self._where)

    def run(
        self, inputs: Sequence[Inputs], wanted: str = LOGITS, step: Step = no_step
    ) -> Iterator[torch.Tensor]:
        """The wanted output for each input; hidden states of a group wait between two blocks."""
        if self._remembered is not None and self._remembered[0] is inputs:
            yield from self.release(self._remembered[1], wanted, step)
            return
        if self.remember and sum(self._bytes_of(one) for one in inputs) < HELD_BYTES:
            self._remembered = inputs, self.hold(inputs, step)
            yield from self.release(self._remembered[1], wanted, step)
            return
        group: list[Inputs] = []
        held = 0
        for one in inputs:
            group.append(one)
            held += self._bytes_of(one)
            if held >= HELD_BYTES:
                yield from self.release(self.hold(group, step), wanted, step)
                group, held = [], 0
        yield from self.release(self.hold(group, step), wanted, step)

    @torch.no_grad()
    def hold(self, inputs: Sequence[Inputs], step: Step = no_step) -> list[Any]:
        """Run up to the last block; the result is what `release` takes."""
        tensors = [_tensors(one) for one in inputs]
        if self._blocks is None or not tensors:
            return list(tensors)
        with _explained(self.model, self._where):
            batches = [self._blocks.start(one) for one in tensors]
            for index in range(self._blocks.depth):
                with self._blocks.loaded(index):
                    for batch in batches:
                        self._blocks.advance(index, batch)
                        step()
        return list(batches)

    def release(
        self, held: list[Any], wanted: str = LOGITS, step: Step = no_step
    ) -> Iterator[torch.Tensor]:
        """The wanted output of what is held, one at a time."""
        for one in held:
            with torch.no_grad(), _explained(self.model, self._where):
                if self._blocks is not None and isinstance(one, Batch):
                    output = self._blocks.finish(one)
                else:
                    output = self.model(**one)
            yield _pick(output, wanted, self.model, self._where)
            step()

    def _bytes_of(self, one: Inputs) -> int:
        config = self.model.config
        width = int(getattr(config, "hidden_size", None) or getattr(config, "d_model", 0) or 1024)
        shape = next(iter(one.values())).shape
        tokens, length = int(np.prod(shape)), int(shape[-1])
        return 4 * tokens * (width + length)  # and what may be kept as a mask


class Kernels(Runner):
    """An output of this tool (or a plain checkpoint) on our products, as `compress.load` has it."""

    name = "kernels"

    def __init__(self, path: Path) -> None:
        self._where = str(path)
        self.model = load(path)

    def require_decoder(self) -> None:
        """Raises InputError where the model is known not to predict the next token."""
        require_decoder(self.model, self._where)

    def run(
        self, inputs: Sequence[Inputs], wanted: str = LOGITS, step: Step = no_step
    ) -> Iterator[torch.Tensor]:
        """The wanted output for each input."""
        extra = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        for one in inputs:
            with torch.no_grad(), _explained(self.model, self._where):
                output = self.model(**_tensors(one), **extra)
            yield _pick(output, wanted, self.model, self._where)
            step()

    def facts(self) -> dict[str, Any]:
        """Engine, versions, the activations' dtype, the kernels."""
        from compress import kernels

        found = kernels.backend()
        return super().facts() | {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "kernels": f"{found.name} ({found.isa})",
        }


class Module(Runner):
    """A user's own torch module: it is called with the first input alone, and returns logits.

    Images go through the `preprocess` of the user's file, else they come as float32 [n, channels,
    height, width] from 0 to 1.
    """

    name = "module"

    def __init__(self, module: torch.nn.Module, where: str) -> None:
        self.module, self._where = module.eval(), where

    def run(
        self, inputs: Sequence[Inputs], wanted: str = LOGITS, step: Step = no_step
    ) -> Iterator[torch.Tensor]:
        """The wanted output for each input."""
        for one in inputs:
            with torch.no_grad(), _explained(self.module, self._where):
                output = self.module(self._given(one))
            yield _pick(output, wanted, self.module, self._where)
            step()

    def _given(self, one: Inputs) -> Any:
        if isinstance(self.module, UserModule) and "images" in one:
            return self.module.prepare(one["images"])
        return _first(one)


def image_values(images: Array) -> Array:
    """Images uint8 [n, height, width, channels] as float32 [n, channels, height, width], 0 to 1."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


def _first(inputs: Inputs) -> torch.Tensor:
    name, values = next(iter(inputs.items()))
    return torch.from_numpy(image_values(values) if name == "images" else values)


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()}


def _pick(output: Any, wanted: str, model: Any, where: str) -> torch.Tensor:
    """The wanted member of what a model returned; a bare tensor is taken as it is."""
    found = output if isinstance(output, torch.Tensor) else getattr(output, wanted, None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if isinstance(found, torch.Tensor):
        return found
    lacks = (
        "no logits: it neither predicts tokens nor classes"
        if wanted == LOGITS
        else "no last hidden state to make an embedding of"
    )
    raise InputError(
        f"{show(where)}: {type(model).__name__} has {lacks}",
        hint="--text needs a decoder, --images a classifier, --pairs a bare encoder such as"
        " BertModel (`architectures` in config.json)",
    )


def require_decoder(model: Any, where: str) -> None:
    """Refuse (InputError) a transformers model that does not predict the next token."""
    if not model.can_generate():
        raise InputError(
            f"{show(where)}: {type(model).__name__} does not predict the next token, so a text has"
            " no perplexity",
            hint="an encoder is evaluated on sentence pairs, a classifier on images",
        )


class _explained:
    """Turns what a model says of an input that it cannot take into an InputError."""

    def __init__(self, model: Any, where: str) -> None:
        self._model, self._where = model, where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError | ValueError | IndexError | TypeError):
            raise InputError(
                f"{show(self._where)}: {type(self._model).__name__} cannot be run on this data:"
                f" {show(str(error), 200)}",
                hint="see the shapes and ids of the data, and how long a sequence may be",
            ) from error
