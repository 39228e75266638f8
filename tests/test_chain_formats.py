"""Formats under the whole tool: what a run wrote is bounded, loads, and comes back."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toolbox import TAGS, tiny_llama, tool, tool_json

from compress import formats, layout
from compress.checkpoint import Checkpoint, manifest, open_checkpoint
from compress.errors import InputError, UsageError
from compress.formats import metadata
from compress.formats.base import Entry
from compress.output import is_compressed, open_any, open_output
from compress.passes.base import CodesSpec, Context, Terms
from compress.passes.low_rank import BASE_STANDS
from compress.passes.quantize import Quantize
from compress.passes.super_weights import SuperWeights
from compress.tensor import DTYPES, Array, Role, TensorInfo
from compress.testing import decide, make_tensor
from compress.tiles import TensorPlan

QUANTIZE = "quantize:bits=4,group=32"
SHARDED = ["--max-shard-size", "1MiB"]
FORMATS = ["native", "compressed-tensors", "dense"]
RECORDED = ["native", "compressed-tensors"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Large enough for several shards of the least size that may be asked for."""
    return tiny_llama(tmp_path / "large", hidden=256, ffn=512, vocabulary=2048)


@pytest.fixture
def trained(shared_dir: Path) -> Path:
    """A Llama with two known super weights in one column."""
    return shared_dir / "models" / "tiny-llama-en"


def header_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found: dict[str, Any] = json.loads(file.read(length))
    return found


def metadata_of(path: Path) -> dict[str, str]:
    found: dict[str, str] = header_of(path)["__metadata__"]
    return found


def values_of(folder: Path) -> dict[str, Array]:
    with open_any(folder) as checkpoint:
        return {i.name: checkpoint.read(i) for i in checkpoint.infos()}


def write(path: Path, tensors: dict[str, Array], notes: dict[str, str]) -> None:
    """A safetensors file with a `__metadata__` of its own."""
    header: dict[str, Any] = {"__metadata__": notes}
    offset, blobs = 0, []
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        span = [offset, offset + len(data)]
        header[name] = {
            "dtype": TAGS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": span,
        }
        offset += len(data)
        blobs.append(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


# -- a base that stands alone ----------------------------------------------------------------

DOWN = "model.layers.1.mlp.down_proj.weight"
SUPER = [(69, 339), (206, 339)]


@pytest.mark.parametrize("format_name", RECORDED)
def test_a_super_weight_has_a_fair_code_where_the_base_stands_alone(
    trained: Path, tmp_path: Path, format_name: str
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    tool_json("run", trained, "-o", out, "super-weights", QUANTIZE, "--format", format_name)
    exact = values_of(trained)
    with open_output(out) as output:
        tensor = output.tensor(DOWN)
        assert tensor.outliers is not None and tensor.codes is not None
        places = zip(tensor.outliers.rows.tolist(), tensor.outliers.columns.tolist(), strict=True)
        assert list(places) == SUPER
        base = tensor.codes.dequantize()
        for row, column in SUPER:
            scale = abs(float(tensor.codes.scale[row, column // 32]))
            error = abs(float(base[row, column]) - float(exact[DOWN][row, column]))
            if format_name == "native":
                assert base[row, column] == 0  # outside of the scale, and never run without
            else:
                assert error <= scale < error + abs(float(exact[DOWN][row, column]))
        decoded = {i.name: output.read(i) for i in output.infos()}
    tool_json("unpack", out, "-o", dense)
    restored = values_of(dense)
    for name, values in restored.items():
        assert values.tobytes() == decoded[name].tobytes(), name
        assert values.dtype == exact[name].dtype
    for place in SUPER:
        assert restored[DOWN][place].tobytes() == exact[DOWN][place].tobytes()


def test_the_adapter_restores_super_weights_in_one_column(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tool_json("run", trained, "-o", out, "super-weights", QUANTIZE)
    with open_checkpoint(out / "adapter" / "adapter_model.safetensors") as adapter:
        arrays = {i.name: adapter.read(i) for i in adapter.infos()}
    prefix = f"base_model.model.{DOWN.removesuffix('.weight')}"
    a, b = arrays[f"{prefix}.lora_A.weight"], arrays[f"{prefix}.lora_B.weight"]
    assert len(arrays) == 2 and a.shape[0] == b.shape[1] == 1 and b.dtype == np.float32
    assert np.flatnonzero(a).tolist() == [339] and a[0, 339] == 1
    assert np.flatnonzero(b).tolist() == [row for row, _ in SUPER]
    exact = values_of(trained)[DOWN].astype(np.float32)
    with open_output(out) as output:
        codes = output.tensor(DOWN).codes
    assert codes is not None
    served = codes.dequantize() + b @ a.astype(np.float32)
    for place in SUPER:
        assert served[place] == pytest.approx(exact[place], rel=1e-6)


def test_super_weights_of_a_bound_pass_go_through_the_quantizer() -> None:
    """The chain of passes that `check_pass` never binds to a base that stands alone."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.02, (8, 64)).astype(np.float32)
    values[3, 40] = 1.5
    tensor = make_tensor("model.layers.0.mlp.down_proj.weight", values)
    protect = decide(
        SuperWeights(method="named", coordinates=(f"{tensor.info.name}:3:40",)), [tensor]
    )
    errors = {}
    for alone in (False, True):
        context = Context(base_stands_alone=alone)
        bound = protect.bind(tensor.info, (), context)
        quantize = Quantize(bits=4, group=32).bind(tensor.info, [bound], context)
        made = quantize.apply(bound.apply(tensor))
        assert made.codes is not None and made.outliers is not None
        assert made.outliers.in_scale is alone
        assert made.decode()[3, 40] == values[3, 40]
        base = float(made.codes.dequantize()[3, 40])
        assert base == (pytest.approx(1.5, abs=0.25) if alone else 0)
        measured = float(((made.decode() - values).astype(np.float64) ** 2).sum())
        assert made.notes["squared_error"] == pytest.approx(measured, rel=1e-5)
        errors[alone] = measured
    assert errors[True] > errors[False]  # the price: its neighbours share the scale


@pytest.mark.parametrize("needs_adapter", [False, True])
def test_alternating_leaves_a_base_that_stands_alone(
    trained: Path, tmp_path: Path, needs_adapter: bool
) -> None:
    quantize = "quantize:bits=2,group=32"
    words = f"low-rank:rank=32,alternate=3,needs_adapter={str(needs_adapter).lower()}"
    tool_json("run", trained, "-o", tmp_path / "alone", quantize)
    tool_json("run", trained, "-o", tmp_path / "out", quantize, words)

    def rows(name: str) -> dict[str, Any]:
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["format"] == "compressed-tensors"
        return {r["name"]: r for r in report["tensors"] if r["passes"]}

    alone, both = rows("alone"), rows("out")
    exact = values_of(trained)
    ratios = []
    with open_output(tmp_path / "out") as output:
        for name, row in both.items():
            codes = output.tensor(name).codes
            assert codes is not None
            error = codes.dequantize().astype(np.float64) - exact[name].astype(np.float64)
            ratios.append((float((error**2).sum()) / alone[name]["squared_error"]) ** 0.5)
            assert row["squared_error"] < alone[name]["squared_error"]
    assert (max(ratios) > BASE_STANDS + 1e-3) == needs_adapter, max(ratios)


# -- outputs are no sources ------------------------------------------------------------------


@pytest.mark.parametrize("format_name", RECORDED)
def test_an_output_is_not_compressed_again(model: Path, tmp_path: Path, format_name: str) -> None:
    out = tmp_path / "out"
    tool_json("run", model, "-o", out, QUANTIZE, "--format", format_name)
    (weights,) = (p for p in out.glob("model*.safetensors"))
    for source in (out, weights):
        for words in (["plan", source], ["run", source, "-o", tmp_path / "again"]):
            done = tool(*words, "prune:sparsity=0.5")
            assert done.returncode == 3, done.stderr
            assert "already compressed by this tool" in done.stderr
            assert "compress unpack" in done.stderr
        assert not (tmp_path / "again").exists()
        with pytest.raises(InputError, match="already compressed"):
            open_checkpoint(source)
        with open_checkpoint(source, allow_quantized=True) as checkpoint:
            assert metadata.is_present(checkpoint.metadata)
    with pytest.raises(UsageError, match="one file of a compressed"):
        open_any(weights)
    tool_json("unpack", out, "-o", tmp_path / "dense")
    tool_json("run", tmp_path / "dense", "-o", tmp_path / "again", "prune:sparsity=0.5")


def test_a_sharded_output_is_not_compressed_again(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tool_json("run", large, "-o", out, QUANTIZE, "--format", "native", *SHARDED)
    index = out / "model.compress.safetensors.index.json"
    for source in (out, index):
        with pytest.raises(InputError, match="already compressed"):
            open_checkpoint(source)


# -- shards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", RECORDED)
def test_a_shard_without_a_changed_tensor_reads_back(
    large: Path, tmp_path: Path, format_name: str
) -> None:
    out = tmp_path / "out"
    words = [QUANTIZE + ",targets=[model.layers.1.mlp.down_proj]", "--format", format_name]
    tool_json("run", large, "-o", out, *words, *SHARDED)
    suffix = formats.get(format_name).weights_suffix
    records = [metadata.decode(metadata_of(p)) for p in sorted(out.glob(f"model-*{suffix}"))]
    changed = [len(r.entries) for r in records]
    assert changed[0] == 0 and sum(changed) == 1 and len(changed) > 2
    assert is_compressed(out)
    tool_json("unpack", out, "-o", tmp_path / "dense")
    before, after = values_of(large), values_of(tmp_path / "dense")
    assert before.keys() == after.keys()
    same = {n for n in before if before[n].tobytes() == after[n].tobytes()}
    assert before.keys() - same == {"model.layers.1.mlp.down_proj.weight"}


# -- exact values of wide dtypes -------------------------------------------------------------


@pytest.mark.parametrize("format_name", ["native", "dense"])
def test_super_weights_of_float64_come_back_to_the_bit(tmp_path: Path, format_name: str) -> None:
    model = tiny_llama(tmp_path / "model", dtype=np.float64)
    name = "model.layers.0.mlp.down_proj.weight"
    protect = 'super-weights:method=named,coordinates=["0:3:5"]'
    out = tmp_path / "out"
    tool_json("run", model, "-o", out, protect, QUANTIZE, "--format", format_name)
    if format_name == "native":
        tool_json("unpack", out, "-o", tmp_path / "dense")
        out = tmp_path / "dense"
    exact, found = values_of(model)[name], values_of(out)[name]
    assert np.float32(exact[3, 5]) != exact[3, 5]  # it would not survive float32
    assert found[3, 5] == exact[3, 5]


# -- tied weights ----------------------------------------------------------------------------


def tied_torch_model(folder: Path) -> Path:
    """A PyTorch file in which two Linear modules share one tensor."""
    torch = pytest.importorskip("torch")
    tiny_llama(folder)
    state = {n: torch.from_numpy(v) for n, v in values_of(folder).items()}
    name = "model.layers.{}.self_attn.o_proj.weight"
    state[name.format(1)] = state[name.format(0)]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


@pytest.mark.parametrize("wanted", ["auto", "dense"])
def test_tied_linear_weights_keep_their_other_name(tmp_path: Path, wanted: str) -> None:
    model = tied_torch_model(tmp_path / "model")
    name = "model.layers.{}.self_attn.o_proj.weight"
    tied = {name.format(1): name.format(0)}
    out, dense = tmp_path / "out", tmp_path / "dense"
    words = ["run", model, "-o", out, QUANTIZE, "--allow-pickle", "--format"]
    done = tool(*words, "compressed-tensors")
    assert done.returncode == 2 and "o_proj" in done.stderr
    tool_json(*words, wanted)
    report = json.loads((out / "report.json").read_text())
    assert report["format"] == {"auto": "native", "dense": "dense"}[wanted]
    with open_any(out) as output:
        assert output.aliases == tied
    if wanted == "auto":
        tool_json("unpack", out, "-o", dense)
        with open_checkpoint(dense) as checkpoint:
            assert checkpoint.aliases == tied


# -- bounds ----------------------------------------------------------------------------------


@st.composite
def open_terms(draw: st.DrawFn, info: TensorInfo, codes: CodesSpec | None) -> Terms:
    """Terms of one tensor, with counts as a plan knows them before its surveys."""
    rows, columns = info.matrix_shape
    nonzeros = None
    if draw(st.booleans()):
        low = draw(st.just(0) | st.integers(0, info.size))
        nonzeros = (low, draw(st.just(info.size) | st.integers(low, info.size)))
    most = draw(st.sampled_from([0, 0, 1, 8]))
    return Terms(
        nonzeros=nonzeros,
        codes=codes if draw(st.booleans()) else None,
        rank=draw(st.sampled_from([0, 0, 1, 12])) if min(rows, columns) > 12 else 0,
        outliers=(0, min(most, info.size)),
        outlier_columns=(0, min(most, columns)),
    )


@st.composite
def decided(draw: st.DrawFn, terms: Terms) -> Terms:
    """The same terms once everything is counted."""
    count = draw(st.integers(*terms.outliers))
    columns = draw(st.integers(min(1, count), min(count, terms.outlier_columns[1])))
    kept = None if terms.nonzeros is None else (draw(st.integers(*terms.nonzeros)),) * 2
    return dataclasses.replace(
        terms, nonzeros=kept, outliers=(count,) * 2, outlier_columns=(columns,) * 2
    )


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(FORMATS), st.sampled_from([500, 5000, 10**9]))
def test_what_comes_out_lies_in_the_planned_range(
    data: st.DataObject, format_name: str, max_shard_bytes: int
) -> None:
    fmt = formats.get(format_name)
    before, after = [], []
    sides = st.integers(1, 8) | st.integers(1, 40)  # in small ones names weigh more than data
    for number in range(data.draw(st.integers(1, 6))):
        shape = data.draw(st.tuples(sides, sides))
        tag = data.draw(st.sampled_from(["F32", "BF16"]))
        name = f"m.{data.draw(st.integers(0, 10**6))}.é.{number}.weight"
        nbytes = shape[0] * shape[1] * DTYPES[tag].itemsize
        info = TensorInfo(name, "model.safetensors", tag, shape, nbytes, role=Role.LINEAR)
        spec = CodesSpec(data.draw(st.integers(2, 8)), shape[1], True, "F16")
        terms = data.draw(open_terms(info, spec))
        before.append(TensorPlan(info, (0,), terms))
        after.append(TensorPlan(info, (0,), data.draw(decided(terms))))
    checkpoint = Checkpoint(Path("nowhere"), None, {})

    def size(plans: list[TensorPlan], end: int | None = None) -> int:
        made = layout.arrange(plans, fmt, checkpoint, {}, end=end, max_shard_bytes=max_shard_bytes)
        if end is None:
            return made.nbytes
        entries = [Entry(t.info, t.terms) for t in plans]
        files = [f.header_specs for f in (*made.shards, *made.parts)]
        return made.nbytes + formats.slack(fmt, entries, files, end)

    low, high = size(before, 0), size(before, 1)
    assert low <= size(after) <= high
    if all(t.terms.exact for t in before):
        assert low == high == size(after)


def test_a_bitmask_at_one_end_only_is_inside_the_range(tmp_path: Path) -> None:
    """The high end of a small matrix is stored dense, without the bitmask that comes out."""
    model = tiny_llama(tmp_path / "model", hidden=16, ffn=16, layers=1, vocabulary=8)
    for sparsity in ("0.3", "0.5"):
        words = [f"prune:sparsity={sparsity}", "quantize:bits=4,group=16", "--format", "native"]
        low, high = tool_json("plan", model, *words)["bytes"]
        out = tmp_path / sparsity
        tool_json("run", model, "-o", out, *words)
        apart = {"report.json", manifest.NAME}
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file() and p.name not in apart)
        assert low <= size <= high


# -- files of the source ---------------------------------------------------------------------


def test_unpack_keeps_the_sources_own_files(model: Path, tmp_path: Path) -> None:
    mine = {"report.md": "a", "report.txt": "b", "adapter/readme.txt": "c"}
    for name, text in mine.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    (model / "recipe.yaml").write_text("theirs")
    out, dense = tmp_path / "out", tmp_path / "dense"
    tool_json("run", model, "-o", out, QUANTIZE)
    tool_json("unpack", out, "-o", dense)
    for name, text in mine.items():
        assert (dense / name).read_text() == text
    assert not (dense / "report.json").exists() and not (dense / "recipe.yaml").exists()


def test_a_source_file_of_our_names_is_left_out_with_a_word(model: Path, tmp_path: Path) -> None:
    for name in ("report.json", "adapter/adapter_config.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("theirs")
    tool_json("run", model, "-o", tmp_path / "out", QUANTIZE, "--format", "native")
    assert not (tmp_path / "out" / "adapter").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("adapter/adapter_config.json" in w for w in report["warnings"])


def test_own_files_are_the_ones_a_run_writes(trained: Path, tmp_path: Path) -> None:
    assert set(layout.PART_FILES.values()) < formats.OWN_FILES
    words = ["super-weights", QUANTIZE, *SHARDED]
    for format_name in RECORDED:
        out = tmp_path / format_name
        tool_json("run", trained, "-o", out, *words, "--format", format_name)
        with open_checkpoint(trained) as checkpoint:
            theirs = {*checkpoint.sidecars, "config.json"}
        written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
        shards = {n for n in written if n.startswith("model-")}
        assert written - theirs - shards <= formats.OWN_FILES


# -- metadata of others, and casts -----------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("format_name", FORMATS)
def test_foreign_metadata_travels_along(
    large: Path, tmp_path: Path, format_name: str, sharded: bool
) -> None:
    notes = {"format": "tf", "modelspec.title": 'a "title"', "license": "é"}
    write(large / "model.safetensors", values_of(large), notes)
    out, dense = tmp_path / "out", tmp_path / "dense"
    words = [QUANTIZE, "--format", format_name, *(SHARDED if sharded else [])]
    tool_json("run", large, "-o", out, *words)
    written = sorted(out.glob("model*.safetensors"))
    assert (len(written) > 1) == sharded
    for path in written:
        found = metadata_of(path)
        assert found.pop(metadata.KEY, None) is None or format_name != "dense"
        expected = "tf" if format_name == "dense" else "pt"
        assert found == notes | {"format": expected}
    if format_name != "dense":
        tool_json("unpack", out, "-o", dense)
        assert metadata_of(dense / "model.safetensors") == notes


@pytest.mark.parametrize(
    ("format_name", "dtype"),
    [
        ("native", np.float32),
        ("native", np.float64),
        ("native", np.float16),
        ("compressed-tensors", np.float32),
        ("compressed-tensors", np.float16),
    ],
)
def test_a_cast_is_undone_by_unpack(tmp_path: Path, format_name: str, dtype: Any) -> None:
    model, out, dense = (tmp_path / n for n in ("model", "out", "dense"))
    tiny_llama(model, dtype=dtype)
    words = [QUANTIZE, "--format", format_name, "--untouched", "bf16"]
    tool_json("run", model, "-o", out, *words)
    name = "model.embed_tokens.weight"
    source = values_of(model)[name]
    rounded = source.astype(ml_dtypes.bfloat16).astype(dtype)
    (weights,) = out.glob("model*.safetensors")
    assert header_of(weights)[name]["dtype"] == "BF16"
    with open_output(out) as output:
        info = output.info(name)
        assert (info.dtype, info.nbytes) == (TAGS[np.dtype(dtype)], source.nbytes)
        assert output.rounded[name] == "BF16"
        assert output.read(info).tobytes() == rounded.tobytes()
        assert output.read(info, 3, 7).tobytes() == rounded[3:7].tobytes()
        for span in ((0, 7), (5, 33), (12, 12), (source.nbytes - 3, source.nbytes)):
            assert bytes(output.read_bytes(info, *span)) == rounded.tobytes()[slice(*span)]
        buffer = bytearray(11)
        output.read_into(info, 9, memoryview(buffer))
        assert buffer == rounded.tobytes()[9:20]
        assert output.tensor(name).source.dtype == dtype
        with pytest.raises(UsageError):
            output.read_bytes(info, 0, source.nbytes + 1)
    assert tool_json("verify", out, "--source", model)["ok"]
    tool_json("unpack", out, "-o", dense)
    before, after = values_of(model), values_of(dense)
    assert {n: v.dtype for n, v in after.items()} == {n: v.dtype for n, v in before.items()}
    assert after[name].tobytes() == rounded.tobytes()


def test_a_cast_that_the_record_invents_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tool_json("run", model, "-o", out, QUANTIZE, "--format", "native", "--untouched", "bf16")
    path = out / "model.compress.safetensors"
    values, notes = {}, metadata_of(path)
    with open_checkpoint(path, allow_quantized=True) as checkpoint:
        values = {i.name: checkpoint.read(i) for i in checkpoint.infos()}
    body = json.loads(notes[metadata.KEY])
    assert body["cast"]["model.norm.weight"] == "F32"
    for cast, what in (
        ({"nothing": "F32"}, "missing"),
        ({"model.layers.0.mlp.up_proj.weight.codes": "F32"}, "codes"),
        ({"model.layers.0.mlp.up_proj.weight": "F32"}, "changed"),
        ({"model.norm.weight": "I64"}, "I64"),
    ):
        write(path, values, notes | {metadata.KEY: json.dumps(body | {"cast": cast})})
        with pytest.raises(InputError, match=what):
            open_output(out)


def test_a_weight_that_a_cast_rounds_up_stays_finite(tmp_path: Path) -> None:
    """65504 is 65536 in bfloat16, which float16 does not hold."""
    model, out = tiny_llama(tmp_path / "model", dtype=np.float16), tmp_path / "out"
    values = values_of(model)
    values["model.norm.weight"][0] = 65504
    write(model / "model.safetensors", values, {"format": "pt"})
    tool_json("run", model, "-o", out, QUANTIZE, "--format", "native", "--untouched", "bf16")
    assert values_of(out)["model.norm.weight"][0] == 65504


def test_a_record_without_the_optional_fields_is_read() -> None:
    info = TensorInfo("a.weight", "", "F32", (8, 8), 256, role=Role.LINEAR)
    entry = Entry(info, Terms(codes=CodesSpec(4, 8, True, "F16")))
    body = json.loads(metadata.encode("native", [entry])[metadata.KEY])
    assert body.keys() == {"version", "format", "tensors"} and body["version"] == 1
    assert metadata.decode({metadata.KEY: json.dumps(body)}).cast == {}


# -- what the report says --------------------------------------------------------------------


def test_the_report_says_how_to_load_the_adapter(trained: Path, tmp_path: Path) -> None:
    words = ["super-weights", QUANTIZE]
    tool_json("run", trained, "-o", tmp_path / "out", *words, "low-rank:rank=16")
    tool_json("run", trained, "-o", tmp_path / "plain", QUANTIZE)
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert "adapter: rank up to 17; vLLM: --enable-lora --max-lora-rank 32" in notes
    assert any("one forward" in note and "PeftModel" in note for note in notes)
    notes = json.loads((tmp_path / "plain" / "report.json").read_text())["notes"]
    assert not any("adapter" in note for note in notes)
