"""Two trained decoders as ONNX with their cache against our own decode: tokens and perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import EXACT, SHARED, Figure, command, compressed, part, session
from greedy import TOKENS, by_graph

# Model, passes, texts, tokens of a window, windows (20 thousand tokens or more).
CASES = (
    ("tiny-llama-en", "quantize:bits=4,group=32", ("wikitext2_test.txt",), 256, 80),
    (
        "stories260k",
        "quantize:bits=4,group=32,on_indivisible=short",
        ("stories_eval.txt", "stories_calib.txt"),
        256,
        80,
    ),
)
PROMPTS = (
    "Once upon a time there was a little girl named", "The", "In the middle of the night the dog",
    "He said that the first", "One day, Tom and his mom went to the park. They", "It was",
)  # fmt: skip


def measure(work: Path) -> list[Figure]:
    figures = []
    for name, passes, texts, window, samples in CASES:
        out = compressed(SHARED / "models" / name, work / name, passes, "--onnx", *EXACT)
        equal, total = greedy(out)
        figures.append(
            Figure(f"{name}: greedy tokens with the cache that are ours", equal / total, 1.0,
                   note=f"{equal} of {total}, {len(PROMPTS)} prompts")
        )  # fmt: skip
        text = work / f"{name}.txt"
        parts = [(SHARED / "data" / one).read_text(encoding="utf-8") for one in texts]
        text.write_text("\n".join(parts), encoding="utf-8")
        found = command(
            "eval", out / "model.onnx", "--reference", out, "--text", text,
            "--window", window, "--samples", samples,
        )["metrics"]  # fmt: skip
        pair = found["perplexity"], found["perplexity_reference"]
        apart = abs(float(f"{pair[0]:.4g}") - float(f"{pair[1]:.4g}"))
        figures.append(
            Figure(f"{name}: perplexity, difference of four digits", apart, 0, at_most=True,
                   note=f"{pair[0]:.6g} and {pair[1]:.6g}, {found['tokens']:.0f} tokens")
        )  # fmt: skip
    return figures


def greedy(out: Path) -> tuple[int, int]:
    """(tokens that are the same, tokens) after every prompt; after the first other one none is."""
    from compress.output import in_float32, open_any

    with open_any(out) as checkpoint:
        import torch
        from transformers import AutoTokenizer

        from compress.runtime.architecture import build
        from compress.runtime.loading import WeightLoader

        plain = in_float32(checkpoint)
        model = build(plain.config, torch.float32, str(out))
        WeightLoader(plain, model, None).run()
        tokenizer = AutoTokenizer.from_pretrained(out)
        graph = session(out / "model.onnx")
        equal = 0
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            for ours, theirs in zip(by_torch(model, ids), by_graph(graph, ids), strict=True):
                if ours != theirs:
                    break
                equal += 1
    return equal, TOKENS * len(PROMPTS)


def by_torch(model: Any, ids: list[int]) -> list[int]:
    """Greedy tokens of transformers' model, with its cache."""
    import torch

    from compress.runtime import cache_names

    found, past, given = [], None, torch.tensor([ids])
    with torch.no_grad():
        for _ in range(TOKENS):
            argument = cache_names.argument_of(model) or cache_names.NAMES[0]
            output = model(given, **{argument: past}, use_cache=True)
            past = cache_names.of_output(output)
            found.append(int(output.logits[0, -1].argmax()))
            given = torch.tensor([found[-1:]])
    return found


if __name__ == "__main__":
    part("ONNX: decoders with their cache, level 0", __doc__, measure)
