"""An output as ONNX: the graph before the work, its two files into the stage after it, the proof.

What a graph needs of the model is known from headers, so it is captured (or taken from the .onnx
file that was compressed) before any work, and every refusal comes then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.checkpoint import Checkpoint, skeleton
from compress.checkpoint.manifest import FileRecord
from compress.checkpoint.stage import Stage
from compress.errors import InputError, ResourceError, show
from compress.export_onnx.builder import DATA_FILE
from compress.export_onnx.data_file import write_data
from compress.export_onnx.lowering import Lowered, lower
from compress.export_onnx.options import ExportOptions
from compress.export_onnx.parity import (
    Feed,
    Parity,
    compare,
    exact_twin,
    made_up_feeds,
    reference_graph,
    remove_folder,
    require_moderate,
    smallest_table,
)
from compress.export_onnx.stored import of_layout, of_output
from compress.output import in_float32, open_any
from compress.run import Progress, peak_memory, silent
from compress.tensor import Array

if TYPE_CHECKING:
    from compress.evaluate.onnx_outputs import Onnx
    from compress.plan import Plan

MODEL_FILE = "model.onnx"
_SAMPLES = 8  # of the calibration's that the proof runs on
_TOKENS = 64  # of a sample
_IMAGES, _PROOF_IMAGES = 32, 64
_STEP = "exporting"
_REAL = ("tensor(float)", "tensor(float16)", "tensor(double)", "tensor(bfloat16)")
GRAPH, MODULE = "graph", "module"  # tasks beside those of capture


@dataclass(frozen=True)
class Prepared:
    """A graph that is ready to take an output's weights.

    graph   the skeleton (ModelProto)
    task    "decoder", "encoder" or "classifier" of transformers; "graph" for an .onnx file;
            "module" for a user's own
    called  the file that the graph was read from; None for a captured one
    """

    graph: Any
    task: str
    options: ExportOptions
    called: str | None = None

    def size(self, plan: Plan, end: int = 1) -> int:
        """Bytes of the two files for the output of a plan, its open ranges closed at one end.

        Ranges of activations, which are measured, are not counted.
        """
        layout = plan.layout(end)
        weights = of_layout(layout, plan.format.name)
        lowered = lower(self.graph, weights, self.options.style, self.called)
        return len(lowered.model.SerializeToString()) + lowered.data_bytes

    def disk(self, plan: Plan) -> int:
        """Bytes of disk that an export needs: its files, and decoded weights for the proof."""
        proof = sum(i.nbytes for i in plan.checkpoint.infos()) if self.task == GRAPH else 0
        return self.size(plan) + proof


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and the section of the report."""

    files: Mapping[str, FileRecord]
    section: Mapping[str, Any]
    failure: str | None = None  # why the graph must not be published

    @property
    def sizes(self) -> dict[str, int]:
        """File name -> bytes."""
        return {name: record.nbytes for name, record in self.files.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(self.sizes.values())


def prepare(
    checkpoint: Checkpoint, options: ExportOptions, progress: Progress = silent
) -> Prepared:
    """The graph of a checkpoint, before any work.

    Raises UsageError for a model that cannot be captured or a package that is missing, InputError
    for what the files hold.
    """
    if checkpoint.graph is not None:
        from onnx import ModelProto

        graph = ModelProto()
        graph.ParseFromString(checkpoint.graph)
        source = checkpoint.graph_path
        called = skeleton.FILE if source is None else source.name
        return Prepared(graph, GRAPH, options, called)
    if options.module is not None:
        from compress.export_onnx.capture_module import capture_module

        made = capture_module(
            options.module,
            checkpoint,
            image_shape=options.image_shape,
            raw_images=True,
            opset=options.opset,
        )
        return Prepared(made, MODULE, options)
    from compress.export_onnx.capture import capture

    captured = capture(checkpoint, opset=options.opset, progress=progress)
    return Prepared(captured.model, captured.task, options)


def export_into(
    stage: Stage,
    prepared: Prepared,
    samples: Mapping[str, Array] | None = None,
    progress: Progress = silent,
    *,
    weights: Checkpoint | None = None,
) -> Exported:
    """Write model.onnx and model.onnx.data for the output in the stage, and prove them.

    samples  what the model was calibrated on: `input_ids` (-1 beyond the end) or `images`
    weights  an open output whose weights are copied; else the stage holds them
    Whether the graph computes what our decode does is `Exported.failure`. Raises InputError where
    it cannot be run, ResourceError where it does not fit a message.
    """
    started = time.perf_counter()
    options = prepared.options
    with ExitStack() as stack:
        output = weights or stack.enter_context(open_any(stage.path))
        progress(_STEP, 0, 3)
        lowered = lower(prepared.graph, of_output(output), options.style, prepared.called)
        model = lowered.model
        files: dict[str, FileRecord] = {}
        if lowered.data_bytes:
            files[DATA_FILE] = write_data(stage, lowered)
        exact = exact_twin(model)
        notes = list(lowered.facts.notes)
        images = None if samples is None else samples.get("images")
        if options.activations != "float" and images is not None:
            model, more = _with_static_activations(stage.path, model, images)
            if model is not lowered.model:
                exact = exact or bytes(lowered.model.SerializeToString())
            notes += more
        files[MODEL_FILE] = _write_graph(stage, model)
        seconds = time.perf_counter() - started
        progress(_STEP, 1, 3)
        proof = _prove(stage, prepared, output, exact, samples)
    progress(_STEP, 3, 3)
    section = _section(lowered, model, files, options, notes, seconds) | {"parity": proof.record()}
    failure = proof.failure(options.tolerance, exact=exact is None)
    return Exported(files, section, None if failure is None else f"{MODEL_FILE}: {failure}")


def _write_graph(stage: Stage, model: Any) -> FileRecord:
    from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

    try:
        raw = model.SerializeToString()
    except (EncodeError, ValueError):
        raw = b""
    if not raw or len(raw) > skeleton.MAX_BYTES:
        raise ResourceError(f"{MODEL_FILE}: the graph alone does not fit the 2 GB of a message")
    return stage.write_file(MODEL_FILE, raw)


def _with_static_activations(folder: Path, model: Any, images: Array) -> tuple[Any, list[str]]:
    """Convolutions of 8-bit integers with activations of 8 bits, whose ranges are measured."""
    from compress.evaluate.onnx_outputs import Onnx
    from compress.export_onnx.activation_ranges import Ranges, collect_ranges
    from compress.export_onnx.batch_norm import fold_batch_norms
    from compress.export_onnx.graph_index import reader_of
    from compress.export_onnx.static_activations import quantizable, with_static_activations

    read = reader_of(str(folder))
    folded = fold_batch_norms(model, read)
    values = quantizable(folded)
    if not values:
        return model, with_static_activations(folded, Ranges({}), read)[1]  # it notes why
    raw = bytes(folded.SerializeToString())
    feeds = _image_feeds(Onnx(folder / MODEL_FILE, raw, called=MODEL_FILE), images)
    ranges = collect_ranges(raw, feeds, values, folder)
    return with_static_activations(folded, ranges, read)


def _image_feeds(runner: Onnx, images: Array) -> Iterator[Feed]:
    """Images as the graph takes them, a batch at a time; what fills no fixed batch is left out."""
    size = next(iter(runner.inputs.values())).shape[0]
    fixed = isinstance(size, int) and size > 0
    step, rest = (size, len(images) % size) if fixed else (_IMAGES, 0)
    for start in range(0, len(images) - rest, step):
        yield runner.feed({"images": images[start : start + step]})


# -- the proof ---------------------------------------------------------------------------------


def _prove(
    stage: Stage, prepared: Prepared, output: Checkpoint, exact: bytes | None,
    samples: Mapping[str, Array] | None,
) -> Parity:  # fmt: skip
    graph = stage.path / MODEL_FILE
    if prepared.task == GRAPH:
        return _prove_graph(stage, prepared, output, exact, samples)
    if prepared.task == MODULE:
        return _prove_module(graph, prepared, output, exact, samples)
    from compress.export_onnx.tasks import ENCODER

    inputs, said = _inputs_of(prepared, output, samples)

    def feeds(runner: Onnx) -> list[Feed]:
        return [_feed(runner, one) for one in inputs]

    name = "last_hidden_state" if prepared.task == ENCODER else "logits"
    return compare(graph, exact, feeds, _decoded(output, inputs, name), said)


def _feed(runner: Any, one: Mapping[str, Array]) -> Feed:
    if "pixel_values" in one:
        return dict(one)
    found: Feed = runner.feed(one)
    return found


def _decoded(
    output: Checkpoint, inputs: Sequence[Mapping[str, Array]], name: str
) -> Iterator[dict[str, Array]]:
    """What transformers computes with the decoded weights."""
    from compress.evaluate.outputs import Decoded

    for values in Decoded(in_float32(output)).run(list(inputs), name):
        yield {name: np.asarray(values.float().numpy())}


def _inputs_of(
    prepared: Prepared, output: Checkpoint, samples: Mapping[str, Array] | None
) -> tuple[list[dict[str, Array]], str]:
    """Some of the calibration's samples, or numbers made up, as transformers' models take them."""
    from compress.calibrate.inputs import IDS, batches_of, vocabulary_of

    if samples is not None and IDS in samples:
        kept = {IDS: samples[IDS][:_SAMPLES, :_TOKENS]}
        return [dict(arrays) for _, arrays in batches_of(kept)], "calibration"
    rng = np.random.default_rng(0)
    pixels = next((i for i in prepared.graph.graph.input if i.name == "pixel_values"), None)
    if pixels is not None:
        shape = [d.dim_value or 2 for d in pixels.type.tensor_type.shape.dim]
        return [{"pixel_values": rng.standard_normal(shape).astype(np.float32)}], "random"
    below = vocabulary_of(output.config) or smallest_table(prepared.graph)
    ids = rng.integers(0, below, (2, 12))
    return [{IDS: ids, "attention_mask": np.ones_like(ids)}], "random"


def _prove_module(
    graph: Path, prepared: Prepared, output: Checkpoint, exact: bytes | None,
    samples: Mapping[str, Array] | None,
) -> Parity:  # fmt: skip
    import torch

    from compress.engines.module import load_module

    images = None if samples is None else samples.get("images")
    said = "random" if images is None else "calibration"
    if images is None:
        shape = prepared.options.image_shape or ()
        images = np.random.default_rng(0).integers(0, 256, (4, *shape)).astype(np.uint8)
    images = images[:_PROOF_IMAGES]
    module = load_module(prepared.options.module or "", in_float32(output))

    def feeds(runner: Onnx) -> list[Feed]:
        return [runner.feed({"images": images})]

    def reference() -> Iterator[dict[str, Array]]:
        with torch.no_grad():
            values = module.call({"images": images})
        yield {"logits": np.asarray(values.float().numpy())}

    return compare(graph, exact, feeds, reference(), said)


def _prove_graph(
    stage: Stage, prepared: Prepared, output: Checkpoint, exact: bytes | None,
    samples: Mapping[str, Array] | None,
) -> Parity:  # fmt: skip
    """The same graph with decoded weights is the reference."""
    from compress.evaluate.onnx_outputs import Onnx

    graph = stage.path / MODEL_FILE
    folder = stage.folder / "reference"
    try:
        path = reference_graph(prepared.graph, in_float32(output), folder)
        where = prepared.called or skeleton.FILE
        reference = Onnx(path, called=where)
        require_moderate(reference, show(where))
        names = [o.name for o in reference.session.get_outputs() if o.type in _REAL]
        if not names:
            raise InputError(
                f"{MODEL_FILE}: no output of floating-point numbers, which the proof compares",
                hint="give the graph one: what its last operator (an ArgMax, say) reads",
            )
        feeds, said = _graph_feeds(prepared, reference, samples, names)
        outputs = [
            dict(zip(names, reference.outputs_of(feed, names), strict=True)) for feed in feeds
        ]
        del reference  # its weights are not compressed
        return compare(graph, exact, lambda _: feeds, outputs, said)
    finally:
        if folder.is_dir():
            remove_folder(folder)


def _graph_feeds(
    prepared: Prepared, runner: Any, samples: Mapping[str, Array] | None, names: Sequence[str]
) -> tuple[list[Feed], str]:
    if samples is not None and "images" in samples:
        return [runner.feed({"images": samples["images"][:_SAMPLES]})], "calibration"
    if samples is not None and "input_ids" in samples:
        from compress.calibrate.inputs import IDS, batches_of

        kept = {IDS: samples[IDS][:_SAMPLES, :_TOKENS]}
        return [runner.feed(arrays) for _, arrays in batches_of(kept)], "calibration"
    if "input_ids" in runner.inputs:
        ids = np.random.default_rng(0).integers(0, smallest_table(prepared.graph), (2, 12))
        return [runner.feed({"input_ids": ids})], "random"
    where = show(prepared.called or skeleton.FILE)
    return made_up_feeds(runner, where, smallest_table(prepared.graph), names), "random"


# -- the report --------------------------------------------------------------------------------


def _section(
    lowered: Lowered, model: Any, files: Mapping[str, FileRecord], options: ExportOptions,
    notes: Sequence[str], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    facts = lowered.facts
    counted = sum(1 for n in model.graph.node if n.op_type == "QuantizeLinear")
    operators = dict(sorted(facts.operators.items()))
    if counted:
        operators["QuantizeLinear"] = counted
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    return {
        "opset": opset,
        "style": options.style.style,
        "self_contained": options.style.self_contained,
        "operators": operators,
        "nodes": len(model.graph.node),
        "graph_bytes": files[MODEL_FILE].nbytes,
        "data_bytes": lowered.data_bytes,
        "shared_bytes": facts.shared_bytes,
        "dense": [{"name": name, "why": why} for name, why in sorted(facts.dense.items())],
        "notes": notes,
        "seconds": round(seconds, 3),
        "peak_memory": peak_memory(),
    }
