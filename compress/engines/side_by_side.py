"""The dense model and a trial of it, run side by side on the same inputs, to correct the trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from compress.calibrate.inputs import IDS, IMAGES, batches_of, lengths_of, split
from compress.checkpoint import Checkpoint
from compress.engines.blocks import Batch, BlockModel
from compress.engines.corrections import Corrector, Judged, Settings, Share, find_units, watch
from compress.engines.module import UserModule, load_module
from compress.errors import UsageError
from compress.tensor import Array, TensorInfo

_AT_ONCE = 32 << 20  # bytes of images that go through a module as one batch
_IMAGES = 32  # in a batch, where they are more
_TOKENS = 2048  # in a batch
_Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Outcome:
    """What corrections came to.

    values         new values by stored tensor, in its dtype and shape
    judged         one entry a layer that differed from the dense model's
    units          layers that could be corrected
    before, after  relative error of the model's output on held-out samples
    learned, held  samples
    """

    values: dict[str, Array]
    judged: list[Judged]
    units: int
    before: float
    after: float
    learned: int
    held: int


class _Distance:
    """Relative error of outputs over many batches."""

    def __init__(self) -> None:
        self._error = self._norm = 0.0

    def add(self, output: torch.Tensor, dense: torch.Tensor) -> None:
        """Add a batch."""
        self._error += float((output - dense).square().sum(dtype=torch.float64))
        self._norm += float(dense.square().sum(dtype=torch.float64))

    @property
    def value(self) -> float:
        """||output - dense|| / ||dense||."""
        return float(np.sqrt(self._error / self._norm)) if self._norm > 0 else 0.0


def correct_module(
    spec: str, source: Checkpoint, trial: Checkpoint, inputs: Mapping[str, Array],
    allowed: _Infos, settings: Settings,
) -> Outcome:  # fmt: skip
    """Correct a user's own torch module (`compress.engines.module`).

    allowed  tensors that may be rewritten, by stored name
    inputs   `images` or `input_ids` of all samples
    Raises UsageError or InputError as `load_module` does.
    """
    dense, now = load_module(spec, source), load_module(spec, trial)
    batches, shares = _module_batches(dense, inputs)

    def outputs(model: UserModule) -> list[torch.Tensor]:
        # Only the held-out samples count, but they come with their batch, so that equals are equal.
        found = [model.run(one) for one in batches]
        return [y[len(y) // s.samples * s.learn :] for y, s in zip(found, shares, strict=True)]

    with torch.no_grad():
        wanted = outputs(dense)
        before = _distance(outputs(now), wanted)
        units = find_units(
            dense.inner, now.inner, lambda name: allowed.get(now.stored.get(name, "")), settings
        )
        order = watch(units, lambda n: dense.run(batches[n]), shares)
        as_it_was = {name: value.clone() for name, value in now.inner.state_dict().items()}

        def attempt(forced: frozenset[str]) -> tuple[Corrector, float]:
            now.inner.load_state_dict(as_it_was)
            corrector = Corrector(settings, forced)
            corrector.correct(order, lambda n: now.run(batches[n]), shares)
            return corrector, _distance(outputs(now), wanted)

        best, after = attempt(frozenset())
        # Matched deviations may cost a layer squared error and still serve what follows.
        for place in [j.unit for j in best.judged if not j.kept]:
            other, error = attempt(best.forced | {place})
            if error < after:
                best, after = other, error
    learned = sum(share.learn for share in shares)
    held = sum(share.samples for share in shares) - learned
    return Outcome(best.values, best.judged, best.units, before, after, learned, held)


def correct_blocks(
    source: Checkpoint, trial: Checkpoint, inputs: Mapping[str, Array], allowed: _Infos,
    settings: Settings,
) -> Outcome:  # fmt: skip
    """Correct a transformers model, one block of each at a time in memory.

    Raises UsageError where the inputs are no token ids or the model has no single stack of blocks.
    """
    if IDS not in inputs:
        raise UsageError(
            "recalibrate: nothing here knows how images get into this model",
            hint="use --module FILE.py:FACTORY",
        )
    dense, now = BlockModel(source), BlockModel(trial)
    learn, held = split(len(inputs[IDS]))
    given = []
    for apart, numbers in ((False, learn), (True, held)):
        for _, arrays in batches_of({IDS: inputs[IDS]}, _TOKENS, numbers):
            given.append((apart, torch.from_numpy(arrays[IDS])))
    shares = [Share(len(ids), 0 if apart else len(ids)) for apart, ids in given]
    streams = _Streams(dense, now, [ids for _, ids in given])
    corrector = Corrector(settings)
    for index in range(now.depth):
        streams.through(index, corrector, shares, allowed, settings)
    before, after = streams.distances([apart for apart, _ in given])
    return Outcome(
        corrector.values, corrector.judged, corrector.units, before, after, len(learn), len(held)
    )


class _Streams:
    """Hidden states of the dense model, of the trial as it was, and of the corrected one."""

    def __init__(self, dense: BlockModel, now: BlockModel, ids: Sequence[torch.Tensor]) -> None:
        self.dense_model, self.model = dense, now
        self.dense = [dense.start({IDS: one}) for one in ids]
        self.now = [now.start({IDS: one}) for one in ids]
        self.before = [Batch(b.inputs, b.hidden, b.calls) for b in self.now]

    @torch.no_grad()
    def through(
        self, index: int, corrector: Corrector, shares: Sequence[Share], allowed: _Infos,
        settings: Settings,
    ) -> None:  # fmt: skip
        """One block: correct its layers, then move all streams behind it."""
        model, prefix = self.model, f"{self.model.prefix}.{index}."

        def stored(name: str) -> TensorInfo | None:
            return allowed.get(model.stored_name(prefix + name) or "")

        with self.dense_model.loaded(index) as dense, model.loaded(index) as now:
            for batch in self.before:
                model.advance(index, batch)

            def run_now(number: int) -> Any:
                batch = self.now[number]
                return model.call_block(index, batch, batch.hidden)

            def judge() -> float:
                error = _Distance()
                for number, share in enumerate(shares):
                    if share.learn < share.samples:
                        error.add(run_now(number), self.dense[number].hidden)
                return error.value

            units = find_units(dense, now, stored, settings)
            order = watch(
                units, lambda number: self.dense_model.advance(index, self.dense[number]), shares
            )
            corrector.correct(order, run_now, shares, judge)
            for batch in self.now:
                model.advance(index, batch)

    @torch.no_grad()
    def distances(self, held: Sequence[bool]) -> tuple[float, float]:
        """Errors of the outputs of held-out batches: before the corrections, and after."""
        before, after = _Distance(), _Distance()
        for place in (n for n, apart in enumerate(held) if apart):
            wanted = _tensor(self.dense_model.finish(self.dense[place]))
            before.add(_tensor(self.model.finish(self.before[place])), wanted)
            after.add(_tensor(self.model.finish(self.now[place])), wanted)
        return before.value, after.value


def _tensor(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits  # type: ignore[no-any-return]


def _distance(outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    found = _Distance()
    for one, dense in zip(outputs, wanted, strict=True):
        found.add(one, dense)
    return found.value


def _module_batches(
    model: UserModule, inputs: Mapping[str, Array]
) -> tuple[list[torch.Tensor], list[Share]]:
    """Prepared inputs and their shares: one batch where it is small, samples to learn from first.

    Of token ids of several lengths, those of the commonest length are taken.
    """
    if IMAGES in inputs:
        values = inputs[IMAGES]
        at_once = 4 * values.size <= _AT_ONCE
        step = len(values) if at_once else _IMAGES
        name = IMAGES
    else:
        lengths = lengths_of(inputs)
        common = int(np.bincount(lengths).argmax())
        values = inputs[IDS][lengths == common][:, :common]
        step = max(1, len(values) if len(values) * common <= _TOKENS else _TOKENS // common)
        name = IDS
    learn, held = split(len(values))
    # A batch of one kind each, or all in one.
    groups = [[*learn, *held]] if step >= len(values) else _cut(learn, step) + _cut(held, step)
    known = set(learn)
    shares = [Share(len(group), sum(n in known for n in group)) for group in groups]
    return [model.prepared({name: values[group]}) for group in groups], shares


def _cut(numbers: Sequence[int], step: int) -> list[list[int]]:
    return [list(numbers[i : i + step]) for i in range(0, len(numbers), step)]
