"""The same files in onnxruntime 1.24 and in the newest: two environments, outputs held together.

The environments are made by pip once (bench/peers/environments.py does it), in build/onnxruntime.
Here onnx.checker looks at every file, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import BENCH, EXACT, ROOT, SHARED, Figure, compressed, minilm, part

sys.path.append(str(BENCH / "peers"))

import environments

FOLDER = ROOT / "build" / "onnxruntime"
VERSIONS = {"onnxruntime-1.24": ["onnxruntime==1.24.4", "numpy"],
            "onnxruntime-newest": ["onnxruntime", "numpy"]}  # fmt: skip
RESNET = SHARED / "models" / "resnet20-12fca82f.th"
MODULE = f"{ROOT / 'tests' / 'resnet_cifar.py'}:resnet20"
IMAGES = SHARED / "data" / "cifar10_calib_600.npz"
TABLE = "quantize:bits=8,group=-1,targets=*word_embeddings"
STORIES = SHARED / "models" / "stories260k"
ROUNDED = 0.05  # 1.24 rounds no activations of products of 2 bits, the newest does
QDQ = ("--onnx-style", "qdq")
# Name, model, passes and options.
CASES = (
    ("MiniLM, 4 bits, level 0", "minilm", ("quantize:bits=4,group=32", TABLE, *EXACT)),
    ("MiniLM, 8 bits", "minilm", ("quantize:bits=8,group=32",)),
    ("MiniLM, 2 bits", "minilm", ("quantize:bits=2,group=32",)),
    ("MiniLM, 3 bits, level 0", "minilm", ("quantize:bits=3,group=32", *EXACT)),
    ("MiniLM, 4 bits, standard operators", "minilm", ("quantize:bits=4,group=32", *QDQ)),
    ("stories260k, 64 greedy tokens", "stories", ("quantize:bits=4,group=32,on_indivisible=short",
                                                  *EXACT)),
    ("ResNet-20, static int8", "resnet", ("quantize:bits=8,group=-1",)),
)  # fmt: skip


def measure(work: Path) -> list[Figure]:
    import numpy as np
    import onnx

    jobs, opsets = {}, {}
    for number, (name, model, words) in enumerate(CASES):
        out = exported(model, work / f"versions-{number}", words)
        path = out / "model.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        imports = onnx.load(path, load_external_data=False).opset_import
        opsets[name] = next(one.version for one in imports if one.domain in ("", "ai.onnx"))
        jobs[name] = {"graph": str(path)} | given(model, work)
    (work / "jobs.json").write_text(json.dumps(jobs))
    found = {}
    environments.ENVIRONMENTS.update(VERSIONS)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in VERSIONS:
        print(environments.make(name, FOLDER, sys.executable, cuda=False), flush=True)
        script = Path(__file__).with_name("session_outputs.py")
        result = work / f"{name}.npz"
        python = environments.python_of(name, FOLDER)
        subprocess.run([str(python), str(script), str(work / "jobs.json"), str(result)], check=True)
        found[name] = dict(np.load(result))
    old, new = found.values()
    print(f"onnxruntime {old['version']} and {new['version']}; onnx.checker says nothing")
    figures = []
    for name in jobs:
        a, b = (one[name].astype(float) for one in (old, new))
        said = f"opset {opsets[name]}"
        if name.startswith("stories"):
            figures.append(
                Figure(f"{name}: the same in both", float((a == b).mean()), 1.0, note=said)
            )
            continue
        error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        goal = 1e-4 if "level 0" in name else ROUNDED
        figures.append(Figure(f"{name}: relative difference", error, goal, at_most=True, note=said))
    return figures


def exported(model: str, out: Path, words: tuple[str, ...]) -> Path:
    """The output of a case."""
    if model == "resnet":
        more = ("--images", IMAGES, "--allow-pickle", "--module", MODULE)
        return compressed(RESNET, out, *words, *more, "--onnx")
    return compressed(minilm() if model == "minilm" else STORIES, out, *words, "--onnx")


def given(model: str, work: Path) -> dict[str, object]:
    """What a graph is fed with."""
    import numpy as np

    if model == "stories":
        return {"prompt": [1, 403, 407, 261, 378]}
    feeds = work / f"feeds-{model}.npz"
    if model == "resnet":
        np.savez(feeds, images=np.load(SHARED / "data" / "cifar10_test_2000.npz")["images"][:200])
    else:
        ids = np.random.default_rng(0).integers(1000, 20000, (4, 24))
        np.savez(feeds, input_ids=ids, attention_mask=np.ones_like(ids),
                 token_type_ids=np.zeros_like(ids))  # fmt: skip
    return {"feeds": str(feeds)}


if __name__ == "__main__":
    part("ONNX: onnxruntime 1.24 and the newest", __doc__, measure)
