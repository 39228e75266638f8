"""The command line: parsing and printing only. Everything heavy is imported when it is needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from compress import __version__, evaluation_commands, interrupts
from compress.calibrate.on_the_way import CalibrateOn
from compress.calibrate_command import calibrate
from compress.errors import CompressError, Interrupted, UsageError, from_os_error, show
from compress.evaluate.on_the_way import EvaluateOn
from compress.export_command import export
from compress.export_onnx.options import ExportWords
from compress.options import (
    CalibrateDocuments,
    CalibrateIds,
    CalibrateImages,
    CalibrateLength,
    CalibrateSamples,
    CalibrateSentences,
    CalibrateText,
    EvalImages,
    EvalPairs,
    EvalSamples,
    EvalText,
    EvalWindow,
    FailIf,
    ImageShape,
    Json,
    Module,
    Onnx,
    OnnxActivations,
    OnnxLevel,
    OnnxOpset,
    OnnxStyle,
    OnnxTolerance,
    Pickle,
    ReportFile,
    SelfContained,
    StatsFile,
)  # fmt: skip
from compress.run_command import job_of, options_of, plan_job, run_job, run_one
from compress.streams import complain
from compress.terminal import (
    console,
    emit,
    leave_threads_to_torch,
    limit_threads,
    progress_bar,
    stream,
)

limit_threads()

app = typer.Typer(
    name="compress",
    help="Make model checkpoints smaller, and prove what that cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ONE_PASS = {
    "prune": "Prune by magnitude, with an exact count, and write the result.",
    "super-weights": "Find super weights and write them beside the checkpoint.",
    "quantize": "Quantize weights to 2-8 bits and write the result.",
    "low-rank": "Repair prune or quantize by low-rank factors (needs one of them: see run).",
    "recalibrate": "Correct norms and biases after other passes (needs one of them: see run).",
}

Model = Annotated[
    Path, typer.Argument(help="A checkpoint: a directory or a weight file.", metavar="MODEL")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The output directory.")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A recipe (YAML) instead of PASS words.")
]
FormatName = Annotated[
    str | None,
    typer.Option(
        "--format", help="auto, compressed-tensors, native, onnx or dense.", metavar="NAME"
    ),
]
Untouched = Annotated[
    str | None,
    typer.Option(help="Dtype of floats that no pass touched: keep, bf16, fp16.", metavar="DTYPE"),
]
Ran = Annotated[
    Path, typer.Argument(help="An output of this tool, or a plain checkpoint.", metavar="OUT")
]
Precision = Annotated[
    str, typer.Option(help="exact, or fast: activations of 8 bits.", metavar="NAME")
]
Threads = Annotated[int, typer.Option(help="Threads; 0 = as torch decides.", min=0, max=1024)]
Jobs = Annotated[int, typer.Option(help="Threads; 0 = one a processor.", min=0, max=1024)]
Memory = Annotated[str, typer.Option(help="Budget for tensors in flight, e.g. 2GB.")]
Seed = Annotated[int | None, typer.Option(help="Seed of random numbers.", min=0)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
NoFsync = Annotated[
    bool, typer.Option("--no-fsync", help="Do not wait for the disk (a power cut may lose OUT).")
]
ContentHash = Annotated[
    bool, typer.Option("--content-hash", help="Record a SHA-256 of the source's weights too.")
]
DecodedHashes = Annotated[
    bool,
    typer.Option("--decoded-hashes", help="Record SHA-256 of the decoded tensors."),
]
Shard = Annotated[str, typer.Option("--max-shard-size", help="Largest weight file, e.g. 5GB.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        help="MODEL, then passes: name or name:key=value,... (with --recipe: MODEL alone).",
        metavar="MODEL [PASS]...",
        show_default=False,
    ),
]


@app.command()
def run(
    words: Words = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The output directory.")] = None,
    recipe: RecipeFile = None,
    format: FormatName = None,
    untouched: Untouched = None,
    jobs: Jobs = 0,
    memory: Memory = "1GB",
    seed: Seed = None,
    fail_if: FailIf = None,
    report: ReportFile = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    allow_pickle: Pickle = False,
    no_fsync: NoFsync = False,
    content_hash: ContentHash = False,
    decoded_hashes: DecodedHashes = False,
    max_shard_size: Shard = "5GB",
    stats: StatsFile = None,
    text: CalibrateText = None,
    sentences: CalibrateSentences = None,
    ids: CalibrateIds = None,
    images: CalibrateImages = None,
    samples: CalibrateSamples = None,
    length: CalibrateLength = None,
    documents: CalibrateDocuments = False,
    eval_text: EvalText = None,
    eval_pairs: EvalPairs = None,
    eval_images: EvalImages = None,
    eval_window: EvalWindow = None,
    eval_samples: EvalSamples = None,
    module: Module = None,
    onnx: Onnx = False,
    onnx_style: OnnxStyle = None,
    onnx_accuracy_level: OnnxLevel = None,
    onnx_opset: OnnxOpset = None,
    onnx_tolerance: OnnxTolerance = None,
    onnx_activations: OnnxActivations = None,
    self_contained: SelfContained = False,
    image_shape: ImageShape = None,
    json: Json = False,
) -> None:
    """Compress a checkpoint: the main job."""
    if out is None:
        raise UsageError("no output directory given", hint="add -o OUT")
    model, job = job_of(words or [], recipe, seed)
    run_job(
        model,
        job,
        out,
        options=options_of(format, untouched, jobs, memory, max_shard_size),
        fail_if=fail_if or [],
        report=report,
        overwrite=overwrite,
        resume=resume,
        allow_pickle=allow_pickle,
        fsync=not no_fsync,
        content_hash=content_hash,
        decoded_hashes=decoded_hashes,
        calibrate_on=CalibrateOn(stats, text, sentences, ids, images, samples, length, documents),
        evaluate_on=EvaluateOn(eval_text, eval_pairs, eval_images, eval_window, eval_samples),
        module=module,
        export=ExportWords(
            onnx, onnx_style, onnx_accuracy_level, onnx_opset, onnx_tolerance, onnx_activations,
            self_contained, image_shape,
        ),
        json=json,
    )  # fmt: skip


@app.command()
def plan(
    words: Words = None,
    recipe: RecipeFile = None,
    format: FormatName = None,
    untouched: Untouched = None,
    jobs: Jobs = 0,
    memory: Memory = "1GB",
    seed: Seed = None,
    survey: Annotated[
        bool, typer.Option("--survey", help="Read the weights once, for exact bytes.")
    ] = False,
    stats: StatsFile = None,
    allow_pickle: Pickle = False,
    max_shard_size: Shard = "5GB",
    onnx: Onnx = False,
    onnx_style: OnnxStyle = None,
    onnx_opset: OnnxOpset = None,
    self_contained: SelfContained = False,
    json: Json = False,
) -> None:
    """Say what `run` would do: bytes, memory, disk, reads. Writes nothing."""
    from compress.show_plan import print_plan

    model, job = job_of(words or [], recipe, seed)
    options = options_of(format, untouched, jobs, memory, max_shard_size)
    export = ExportWords(onnx, onnx_style, None, onnx_opset, self_contained=self_contained)
    body = plan_job(
        model, job, options, stats=stats, survey=survey, allow_pickle=allow_pickle, export=export
    )
    emit(body, json, lambda: print_plan(body, console()))


@app.command()
def inspect(
    model: Model,
    values: Annotated[
        bool, typer.Option("--values", help="Read the weights: zeros, extremes, outliers.")
    ] = False,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Singular values too: energy of rank 16, 64.")
    ] = False,
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """List tensors, dtypes, sizes and roles; with --values what the weights look like."""
    from compress.inspection import inspect_model, print_inspection

    body = inspect_model(model, values=values, spectra=spectra, allow_pickle=allow_pickle)
    emit(body, json, lambda: print_inspection(body, console()))


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="An output of this tool.", metavar="OUT")],
    source: Annotated[
        Path | None,
        typer.Option("--source", help="Check untouched tensors against the original too."),
    ] = None,
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Check an output: manifest, hashes, headers, finite values."""
    from compress.verification import verify_output

    body = verify_output(out, source=source, allow_pickle=allow_pickle)
    emit(body, json, lambda: typer.echo(body["summary"]))


@app.command()
def unpack(
    out: Annotated[Path, typer.Argument(help="An output of this tool.", metavar="OUT")],
    dense: Annotated[Path, typer.Option("--out", "-o", help="The plain checkpoint to write.")],
    overwrite: Overwrite = False,
    no_fsync: NoFsync = False,
    json: Json = False,
) -> None:
    """Write the compressed checkpoint back as a plain one of the source's dtype."""
    from compress.unpacking import unpack_output

    with progress_bar() as progress:
        body = unpack_output(out, dense, overwrite=overwrite, fsync=not no_fsync, progress=progress)
    emit(body, json, lambda: typer.echo(body["summary"]))


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="The reference checkpoint.", metavar="A")],
    b: Annotated[
        Path, typer.Argument(help="The other: plain or an output of this tool.", metavar="B")
    ],
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor."""
    from compress.comparison import diff_models, print_diff

    body = diff_models(a, b, allow_pickle=allow_pickle)
    emit(body, json, lambda: print_diff(body, console()))


@app.command()
def generate(
    out: Ran,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.", min=1)] = 64,
    precision: Precision = "exact",
    threads: Threads = 0,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest token each time; else drawn.", min=0, max=100)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of drawn tokens.", min=0)] = 0,
    json: Json = False,
) -> None:
    """Continue a text with a compressed model, from its packed weights."""
    leave_threads_to_torch()
    from compress.runtime.generate import generate_text, summary

    body = generate_text(
        out,
        prompt,
        max_new_tokens=max_new_tokens,
        precision=precision,
        threads=threads or None,
        temperature=temperature,
        seed=seed,
        write=None if json else stream,
    )
    emit(body, json, typer.echo)
    if not json:
        typer.echo(summary(body), err=True)


app.command()(calibrate)
app.command("export")(export)


@app.command()
def bench(
    out: Ran,
    reference: Annotated[
        Path | None, typer.Option(help="A plain checkpoint to run beside it.", metavar="MODEL")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=5)] = 64,
    threads: Threads = 0,
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="Time single products, too.")
    ] = True,
    json: Json = False,
) -> None:
    """Measure a compressed model here: tokens a second, memory, each layer."""
    leave_threads_to_torch()
    from compress.runtime.bench import bench_model, print_bench

    body = bench_model(
        out, reference=reference, tokens=tokens, threads=threads or None, layers=layers
    )
    emit(body, json, lambda: print_bench(body, console()))


@app.command()
def kernels(json: Json = False) -> None:
    """Say which kernels run here, with which instruction set, and why."""
    from compress import kernels as module

    found = module.backend()
    body = {"backend": found.name, "isa": found.isa, "reason": found.reason}
    emit(body, json, lambda: typer.echo(f"{found.name} ({found.isa}): {found.reason}"))


app.command("eval")(evaluation_commands.evaluate)
app.command("sweep")(evaluation_commands.sweep)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"compress {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: one line for an error, the exit code of its kind, no traceback."""
    _register_one_pass_commands(sys.argv[1:])
    interrupts.catch()
    try:
        app(prog_name="compress")
    except CompressError as error:
        _fail(error)
    except MemoryError:
        _fail(_resource("out of memory", "use fewer --jobs or a smaller --memory"))
    except OSError as error:
        _fail(from_os_error(error, doing="I/O failed"))
    except Exception as error:
        if os.environ.get("COMPRESS_DEBUG"):
            raise
        message = f"internal error: {type(error).__name__}: {show(str(error), 200)}"
        _fail(CompressError(message, hint="COMPRESS_DEBUG=1 shows where; please report it"))


def _register_one_pass_commands(arguments: list[str]) -> None:
    """Add the four one-pass commands; only the one that is called loads its options."""
    for name, text in ONE_PASS.items():
        if name in arguments[:1]:
            from compress.pass_command import make_command

            app.command(name, help=text)(make_command(name, run_one))
        else:

            def stub() -> None:
                """Replaced when the command is called."""

            app.command(name, help=text)(stub)


def _resource(message: str, hint: str) -> CompressError:
    from compress.errors import ResourceError

    return ResourceError(message, hint=hint)


def _fail(error: CompressError) -> None:
    number = interrupts.arrived()
    if number is not None:  # whatever the interrupted code made of it
        interrupts.ignore()
        error = Interrupted(number)
    complain(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []))
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
