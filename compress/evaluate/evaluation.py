"""One model against data and a reference: every figure of `compress/evaluate/metrics.py`.

    with open_any(path) as model, open_any(other) as reference:
        evaluator = Evaluator(load_data(request, model), reference=Decoded(reference))
        metrics = evaluator.run(Decoded(model))

An evaluator may judge many models: what it needs of the reference is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from compress.errors import UsageError
from compress.evaluate import pairs
from compress.evaluate.data import Data, ImageData, PairData, TextData
from compress.evaluate.divergence import Divergence
from compress.evaluate.images import Accuracy
from compress.evaluate.outputs import Decoded, Runner, Step
from compress.evaluate.pairs import Vector
from compress.evaluate.perplexity import Likelihood

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


class Evaluator:
    """Data, and a reference to compare with where there is one."""

    def __init__(self, data: Data, reference: Runner | None = None) -> None:
        self.data, self.reference = data, reference
        if isinstance(reference, Decoded):
            reference.remember = True
        self._embeddings: Vector | None = None
        self._logits: list[torch.Tensor] | None = None

    def run(self, model: Runner, progress: Progress = silent) -> dict[str, float]:
        """Every figure that there is. Raises InputError where model and data do not fit."""
        steps = _Steps(progress, self._steps(model))
        if isinstance(self.data, PairData):
            return self._pairs(self.data, model, steps)
        if isinstance(self.data, ImageData):
            return self._images(self.data, model, steps)
        return self._text(self.data, model, steps)

    def record(self, model: Runner) -> dict[str, Any]:
        """What was measured how: data, settings, engines, versions (JSON types)."""
        from compress import __version__
        from compress.runtime.architecture import require_transformers

        reference = None if self.reference is None else self.reference.facts()
        versions = {"compress": __version__, "transformers": require_transformers().__version__}
        return {
            "data": dict(self.data.record),
            "model_engine": model.facts(),
            "reference_engine": reference,
            "versions": versions,
        }

    # ------------------------------------------------------------ one kind of data each

    def _text(self, data: TextData, model: Runner, step: Step) -> dict[str, float]:
        own, theirs, apart = Likelihood(), Likelihood(), Divergence()
        outputs = model.run(data.inputs, step=step)
        compared = None
        if self.reference is not None:
            compared = self.reference.run(data.inputs, step=step)
        for window, batch in zip(data.windows, outputs, strict=True):
            logits, ids = batch[0], torch.from_numpy(window.ids)
            _check_vocabulary(logits, ids)
            own.add(logits, ids, window.scored)
            if compared is not None:
                reference = next(compared)[0]
                apart.add_sequence(reference, logits, window.scored)
                theirs.add(reference, ids, window.scored)
        found = {"perplexity": own.perplexity}
        if compared is not None:
            found |= {
                "perplexity_reference": theirs.perplexity,
                "perplexity_ratio": own.perplexity / theirs.perplexity,
                "kl": apart.kl,
                "top1_agreement": apart.top1_agreement,
            }
        return found | {"tokens": float(own.tokens)}

    def _pairs(self, data: PairData, model: Runner, step: Step) -> dict[str, float]:
        own = pairs.embed(model, data.sentences, step)
        found = {"spearman": _correlation(own, data)}
        if self.reference is not None:
            if self._embeddings is None:
                self._embeddings = pairs.embed(self.reference, data.sentences, step)
            theirs = self._embeddings
            if theirs.shape != own.shape:
                raise UsageError(
                    f"the model's embeddings have {own.shape[1]} values, the reference's"
                    f" {theirs.shape[1]}",
                    hint="compare a model with the one that it was made from",
                )
            reference = _correlation(theirs, data)
            found["spearman_reference"] = reference
            found["spearman_drop"] = reference - found["spearman"]
            found["cosine"] = float(pairs.cosines(own, theirs).mean())
        return found | {"pairs": float(len(data.scores))}

    def _images(self, data: ImageData, model: Runner, step: Step) -> dict[str, float]:
        seen, apart = Accuracy(), Divergence()
        if self.reference is not None and self._logits is None:
            self._logits = list(self.reference.run(data.inputs, step=step))
        first = 0
        for number, logits in enumerate(model.run(data.inputs, step=step)):
            labels = data.labels[first : first + len(data.inputs[number]["images"])]
            first += len(labels)
            reference = None if self._logits is None else self._logits[number]
            seen.add(logits, labels, reference)
            if reference is not None:
                apart.add(reference, logits)
        found = {"accuracy": seen.accuracy}
        if self.reference is not None:
            found |= {
                "accuracy_reference": seen.accuracy_reference,
                "accuracy_drop": seen.drop,
                "accuracy_drop_error": seen.drop_error,
                "kl": apart.kl,
                "top1_agreement": apart.top1_agreement,
            }
        return found | {"images": float(seen.count)}

    def _steps(self, model: Runner) -> int:
        """Steps that a run takes."""
        data = self.data
        count = pairs.batches_of(data.sentences) if isinstance(data, PairData) else len(data.inputs)
        known = self._embeddings is not None or self._logits is not None
        reference = 0 if self.reference is None or known else self.reference.steps
        return count * (model.steps + reference)


@dataclass
class _Steps:
    """Counts steps for a progress callback."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        self.progress("evaluate", self.done, max(self.done, self.total))


def _correlation(embeddings: Vector, data: PairData) -> float:
    half = len(data.scores)
    cosines = pairs.cosines(embeddings[:half], embeddings[half:])
    return 100 * pairs.spearman(cosines, data.scores)


def _check_vocabulary(logits: torch.Tensor, ids: torch.Tensor) -> None:
    if logits.ndim != 2 or len(logits) != len(ids):
        raise UsageError(
            f"the model's output for {len(ids)} tokens is {list(logits.shape)}, not"
            f" [{len(ids)}, vocabulary]",
            hint="--text needs a decoder that returns logits for every token",
        )
    if int(ids.max()) >= logits.shape[1]:
        raise UsageError(
            f"token id {int(ids.max())} is out of the model's vocabulary of {logits.shape[1]}",
            hint="use the tokenizer of this model",
        )
