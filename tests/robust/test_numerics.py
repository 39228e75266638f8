"""Edge weights through whole runs: refused by name, or within the bound; every byte written.

Each model holds one tensor for each edge, so that a run meets them side by side. Memory that numpy
hands out uninitialised is filled with a pattern: bytes that nobody wrote would show in the output.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from toolbox import TAGS, tool, tree, write_safetensors

from compress.checkpoint import open_checkpoint
from compress.errors import CompressError, InputError, UsageError
from compress.output import CompressedCheckpoint, open_any
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run
from compress.tensor import Tensor
from compress.verification import verify_output

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
TAGS |= {dtype: tag for tag, dtype in DTYPES.items()}
SLACK = 1 + 2**-10
EMPTY = np.empty


def edges(dtype: np.dtype[Any]) -> dict[str, np.ndarray]:
    """Matrices that every pass must take; `huge` is what a group with an fp16 scale can hold."""
    rng = np.random.default_rng(5)
    limits = ml_dtypes.finfo(dtype)
    large = min(float(limits.max), 60000.0)
    plain = rng.standard_normal((6, 64))
    made = {
        "plain": plain,
        "zeros": np.zeros((4, 32)),
        "negative_zeros": np.full((4, 32), -0.0),
        "constant": np.full((4, 32), 0.75),
        "negative": np.full((3, 32), -1.5),
        "subnormal": np.sign(plain) * float(limits.smallest_subnormal),
        "smallest": np.sign(plain) * float(limits.smallest_normal),
        "tiny_and_one": np.where(np.arange(64) == 9, 1.0, plain * 1e-6),
        "huge": np.where(np.arange(64) == 3, large, plain),
        "opposite": np.where(np.arange(64) % 2, large, -large)[None],
        "zero_row": plain * (np.arange(6)[:, None] != 2),
        "one_row": plain[:1],
        "one_column": plain[:, :1],
        "one": plain[:1, :1],
        "odd": rng.standard_normal((7, 37)),
        "tall": rng.standard_normal((67, 3)),
    }
    with np.errstate(over="ignore"):
        return {f"layers.0.{name}.up_proj.weight": v.astype(dtype) for name, v in made.items()}


QUANTIZE = [
    *(f"bits={b},group=32,symmetric={s}" for b in range(2, 9) for s in ("true", "false")),
    *(f"bits={b},group={g},symmetric={s}"
      for b, g, s in itertools.product((2, 4, 8), (-1, 0), ("true", "false"))),
    "bits=4,group=32,scale_dtype=bf16",
    "bits=3,group=32,scale_dtype=fp32,symmetric=false",
    "bits=2,group=32,scale_dtype=bf16",
    "bits=8,group=32,scale_dtype=bf16,symmetric=false",
    "bits=8,group=0,scale_dtype=bf16,symmetric=false",
]  # fmt: skip
SHORT = "on_indivisible=short,targets=*"


@contextmanager
def poisoned(pattern: int) -> Iterator[None]:
    """`np.empty` gives memory that is filled with a byte: 0xff makes every float a NaN."""

    def empty(*shape: Any, **options: Any) -> np.ndarray:
        made = EMPTY(*shape, **options)
        if made.nbytes and made.dtype != object and made.flags.c_contiguous:
            made.reshape(-1).view(np.uint8)[:] = pattern
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", empty)
        yield


def test_the_pattern_reaches_what_is_tested() -> None:
    import compress.solvers.group_quantizer as one_of_many

    with poisoned(0xFF):
        assert np.isnan(one_of_many.np.empty((2, 3), np.float32)).all()
        assert one_of_many.np.empty(2, np.uint8).tolist() == [255, 255]
    assert np.empty is EMPTY


def compress(model: Path, out: Path, *words: str, format_name: str = "native") -> Path:
    recipe = Recipe(passes=tuple(parse_pass(word) for word in words))
    with open_checkpoint(model) as checkpoint:
        plan = make_plan(checkpoint, recipe, Options(format=format_name, jobs=1))
        run(plan, out, RunOptions(fsync=False))
    return out


@pytest.fixture(scope="module", params=DTYPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_safetensors(folder / "model.safetensors", edges(DTYPES[request.param]))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sources(model: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(model) as checkpoint:
        return {i.name: checkpoint.read(i) for i in checkpoint.infos()}


def check_all_finite(out: Path) -> None:
    """Every decoded value and every stored float of an output."""
    with open_any(out) as checkpoint:
        for info in checkpoint.infos():
            assert np.isfinite(checkpoint.read(info).astype(np.float64)).all(), info.name
        stored = checkpoint.stored if isinstance(checkpoint, CompressedCheckpoint) else checkpoint
        for info in stored.infos():
            if info.is_float:
                assert np.isfinite(stored.read(info).astype(np.float64)).all(), info.name
    verify_output(out)


def largest_error(one: Tensor, source: np.ndarray) -> float:
    """The largest error of a matrix's codes in scales, in float64."""
    assert one.codes is not None
    weights = one.info.to_matrix(source).astype(np.float64)
    error = np.abs(weights - one.decode().astype(np.float64))
    per_group = np.abs(one.codes.scale.astype(np.float64))
    assert (per_group > 0).all()
    scale = np.repeat(per_group, one.codes.group_size, axis=1)[:, : weights.shape[1]]
    return float((error / scale).max(initial=0))


def test_quantize_is_within_half_a_scale(model: Path, tmp_path: Path) -> None:
    """Without a search: at most scale/2 (1 + 2^-10) a weight, whatever the weights."""
    weights, worst = sources(model), {}
    for number, words in enumerate(QUANTIZE):
        out = compress(model, tmp_path / str(number), f"quantize:{words},search=none,{SHORT}")
        check_all_finite(out)
        with open_any(out) as checkpoint:
            assert isinstance(checkpoint, CompressedCheckpoint)
            assert set(checkpoint.entries) == set(weights)
            for name, source in weights.items():
                found = largest_error(checkpoint.tensor(name), source)
                if found > SLACK / 2:
                    worst[words, name] = found
    assert worst == {}


PASSES = {
    "searched": ("native", ["quantize:bits=4,group=32,on_indivisible=short,targets=*"]),
    "codes": ("compressed-tensors", ["quantize:bits=4,group=-1,targets=*"]),
    "pruned": ("native", ["prune:sparsity=0.5,targets=*"]),
    "pruned_dense": ("dense", ["prune:sparsity=0.5,targets=*"]),
    "pruned_codes": (
        "native", ["prune:sparsity=0.3,targets=*", f"quantize:bits=3,group=16,{SHORT}"],
    ),
    "dense_codes": ("dense", [f"quantize:bits=2,group=16,{SHORT}"]),
    "factors": ("native", [f"quantize:bits=2,group=32,{SHORT}", "low-rank:rank=1,targets=*"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_every_byte_is_written_and_finite(model: Path, tmp_path: Path, name: str) -> None:
    """The same output over memory that held other bytes before, and no NaN from it."""
    format_name, words = PASSES[name]
    if format_name == "compressed-tensors" and model.name.startswith(("F64", "F8")):
        with pytest.raises(UsageError, match="the engines decode to F32, F16 or BF16"):
            compress(model, tmp_path / "out", *words, format_name=format_name)
        return
    found = []
    for pattern in (0xFF, 0x5A):
        with poisoned(pattern):
            out = compress(model, tmp_path / str(pattern), *words, format_name=format_name)
            check_all_finite(out)
        found.append({n: d for n, d in tree(out).items() if n.endswith(".safetensors")})
    assert found[0] == found[1]


def test_what_is_kept_is_exact(model: Path, tmp_path: Path) -> None:
    """Pruning alone: every weight is its own bits or zero; as many zeros as were asked for."""
    weights = sources(model)
    for format_name in ("native", "dense"):
        out = compress(
            model, tmp_path / format_name, "prune:sparsity=0.5,targets=*", format_name=format_name
        )
        zeros = total = 0
        with open_any(out) as checkpoint:
            for name, source in weights.items():
                decoded = checkpoint.read(checkpoint.info(name))
                kept = decoded.astype(np.float64) != 0
                assert np.array_equal(decoded[kept].view(np.uint8), source[kept].view(np.uint8))
                zeros += int((~kept).sum())
                total += kept.size
        assert zeros >= total // 2


# -- what is refused ---------------------------------------------------------------------------

MLP = "model.layers.0.mlp.{}_proj.weight"
BAD = MLP.format("down")
REFUSING = {
    "quantize": [f"quantize:bits=4,group=32,{SHORT}"],
    "per_tensor": ["quantize:bits=8,group=0,symmetric=false,targets=*"],
    "prune": ["prune:sparsity=0.5,targets=*"],
    "prune_n_of_m": ["prune:pattern=2:4,targets=*"],
    "chain": ["prune:sparsity=0.5,targets=*", f"quantize:bits=4,group=32,{SHORT}"],
    "factors": [f"quantize:bits=4,group=32,{SHORT}", "low-rank:rank=1,targets=*"],
    "super": ["super-weights"],
}


@pytest.mark.parametrize("tag", DTYPES)
def test_weights_that_are_not_finite_are_refused_by_name(tag: str, tmp_path: Path) -> None:
    """NaN and infinities: exit 3, the tensor and the place named, OUT not made."""
    bad = [np.nan] if tag == "F8_E4M3" else [np.nan, np.inf, -np.inf]  # it has no infinity
    outcomes = {}
    for value, (name, words) in itertools.product(bad, REFUSING.items()):
        folder = tmp_path / f"{value}{name}"
        folder.mkdir()
        values = np.random.default_rng(0).standard_normal((32, 32))
        values[2, 5] = value
        tensors = {MLP.format("up"): np.ones((32, 32)), MLP.format("gate"): np.ones((32, 32))}
        tensors[BAD] = values
        write_safetensors(
            folder / "model.safetensors", {n: v.astype(DTYPES[tag]) for n, v in tensors.items()}
        )
        outcomes[name, value] = refusal(folder, tmp_path / f"out{value}{name}", words)
    wrong = {
        key: error
        for key, error in outcomes.items()
        if not isinstance(error, InputError)
        or BAD not in error.message
        or not error.message.isprintable()
        or not error.hint
    }
    assert wrong == {}


def refusal(model: Path, out: Path, words: list[str]) -> CompressError | None:
    try:
        compress(model, out, *words)
    except CompressError as error:
        assert sorted(p.name for p in model.iterdir()) == ["model.safetensors"], "something is left"
        return error
    check_all_finite(out)
    return None


@pytest.mark.parametrize("tag", ["F64", "F32", "BF16"])
def test_a_scale_that_overflows_is_refused_or_widened(tag: str, tmp_path: Path) -> None:
    """A group with a weight that needs a scale past fp16; bf16 and fp32 scales hold it."""
    folder = tmp_path / "model"
    folder.mkdir()
    values = np.random.default_rng(0).standard_normal((4, 32))
    values[1, 7] = 3e38
    write_safetensors(folder / "model.safetensors", {"big.weight": values.astype(DTYPES[tag])})
    error = refusal(folder, tmp_path / "no", [f"quantize:bits=4,group=32,{SHORT}"])
    assert isinstance(error, InputError)
    assert "big.weight" in error.message and "fp16" in error.message
    assert error.hint is not None and "scale_dtype" in error.hint
    weights = sources(folder)["big.weight"]
    for scale, symmetric in itertools.product(("bf16", "fp32"), ("true", "false")):
        words = f"quantize:bits=4,group=32,{SHORT},search=none,scale_dtype={scale}"
        out = compress(folder, tmp_path / (scale + symmetric), f"{words},symmetric={symmetric}")
        check_all_finite(out)
        with open_any(out) as checkpoint:
            assert isinstance(checkpoint, CompressedCheckpoint)
            assert largest_error(checkpoint.tensor("big.weight"), weights) <= SLACK / 2


def test_squares_past_float32_are_not_called_a_loss(tmp_path: Path) -> None:
    values = np.full((4, 32), 3e38, np.float32)
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {"big.weight": values})
    words = f"quantize:bits=4,group=32,{SHORT},scale_dtype=bf16"
    done = tool("run", folder, "-o", tmp_path / "out", words)
    assert done.returncode == 0, done.stderr
    assert "no error can be compared" in done.stdout + done.stderr
    assert "nan" not in done.stdout.lower() + done.stderr.lower()
    assert tool("verify", tmp_path / "out").returncode == 0


def test_a_float64_past_float32_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    values = np.ones((4, 32))
    values[3, 1] = -1e300
    write_safetensors(folder / "model.safetensors", {"far.weight": values})
    words = ["quantize:bits=4,group=32,scale_dtype=fp32,targets=*"]
    error = refusal(folder, tmp_path / "out", words)
    assert isinstance(error, InputError)
    assert "far.weight" in error.message and "too large for float32" in error.message


@pytest.mark.parametrize("tag", DTYPES)
def test_tensors_without_a_matrix_are_left_or_refused(tag: str, tmp_path: Path) -> None:
    """Empty, 0-d and 1-d tensors beside a matrix: never changed, never lost, whatever is asked."""
    folder = tmp_path / "model"
    folder.mkdir()
    odd = {
        "no_rows.weight": np.zeros((0, 32)),
        "no_columns.weight": np.zeros((4, 0)),
        "scalar.weight": np.array(2.5),
        "vector.weight": np.arange(7.0),
        "one.weight": np.ones(1),
        "nothing.weight": np.zeros(0),
    }
    tensors = {"matrix.weight": np.random.default_rng(0).standard_normal((4, 32)), **odd}
    write_safetensors(
        folder / "model.safetensors", {n: v.astype(DTYPES[tag]) for n, v in tensors.items()}
    )
    before = sources(folder)
    for name, words in REFUSING.items():
        out = tmp_path / name
        error = refusal(folder, out, words)
        if error is not None:  # by name, before any work
            assert error.exit_code in (2, 3), error.message
            assert any(n in error.message for n in odd), error.message
            continue
        with open_any(out) as checkpoint:
            assert {i.name for i in checkpoint.infos()} == set(before)
            for odd_name in odd:
                after = checkpoint.read(checkpoint.info(odd_name))
                assert after.shape == before[odd_name].shape
                assert after.tobytes() == before[odd_name].tobytes()
