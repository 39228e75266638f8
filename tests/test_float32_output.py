"""An output read in float32: rows of a table are those of the whole, and it stays in its codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.checkpoint import open_checkpoint
from compress.output import in_float32, open_output
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run

NAME = "model.embed_tokens.weight"
ROUND = f"quantize:targets=[{NAME}],bits=8"


@pytest.mark.parametrize(
    "words",
    [
        [f"{ROUND},group=16"],
        [f"{ROUND},group=16,symmetric=false"],
        [f"{ROUND},group=0"],
        [f"{ROUND},group=16", f"low-rank:rank=2,targets=[{NAME}]"],
    ],
)
def test_rows_of_a_table(tmp_path: Path, words: list[str]) -> None:
    table = np.random.default_rng(2).normal(size=(40, 32)).astype(np.float16)
    source = tmp_path / "model"
    source.mkdir()
    save_file({NAME: table}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "llama"}')
    recipe = Recipe(tuple(parse_pass(word) for word in words))
    with open_checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint, recipe, Options(format="native"))
        run(plan, tmp_path / "out", RunOptions(fsync=False))
    with open_output(tmp_path / "out") as output:
        wanted = output.tensor(NAME).decode()
        opened = in_float32(output)
        info = opened.info(NAME)
        rows = [opened.read(info, i, i + 1)[0] for i in (0, 39, 7)]
        np.testing.assert_array_equal(rows, wanted[[0, 39, 7]])
        np.testing.assert_array_equal(opened.read(info, 3, 9), wanted[3:9])
        np.testing.assert_array_equal(opened.read(info), wanted)
        assert not np.array_equal(wanted, wanted.astype(np.float16))  # more than the source holds
