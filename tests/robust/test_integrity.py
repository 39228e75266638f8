"""`verify` finds every damage to every file of every kind of output, without the source."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGES, KINDS, damaged, files_of, outputs, produce
from toolbox import tiny_llama, tool, tree

from compress import decoded_hashes, tensor
from compress.checkpoint import manifest
from compress.checkpoint.manifest import FileRecord
from compress.errors import InputError, UsageError, VerifyError
from compress.kernels import dispatch
from compress.output import open_output
from compress.unpacking import unpack_output
from compress.verification import verify_output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return outputs(tmp_path_factory.mktemp("outputs"))


def is_found(out: Path) -> bool:
    try:
        verify_output(out)
    except VerifyError as error:
        assert error.message.isprintable() and error.exit_code == 5
        return True
    return False


@pytest.mark.parametrize("kind", [*KINDS, "graph", "unpacked", "genai"])
def test_every_damage_is_found(made: dict[str, Path], kind: str) -> None:
    out = made[kind]
    verify_output(out)
    rng = random.Random(kind)
    missed, touched = [], set()
    for how, count in {"flip": 80, "truncate": 12, "swap": 8, "extend": 4, "zero": 12}.items():
        for _ in range(count):
            with damaged(out, rng, how) as one:
                touched.add(one.path)
                if not is_found(out):
                    missed.append(str(one))
    assert missed == []
    assert touched == set(files_of(out)), "more attempts are needed to meet every file"
    assert set(DAMAGES) == {"flip", "truncate", "swap", "extend", "zero"}
    verify_output(out)


def test_files_that_come_and_go_are_found(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made["adapter"], out)
    for path in files_of(out):
        moved = path.rename(tmp_path / "away")
        assert is_found(out), path.name
        moved.rename(path)
    (out / "adapter" / "more").write_bytes(b"")
    assert is_found(out)


def test_every_letter_and_digit_of_a_manifest_counts(tmp_path: Path) -> None:
    """Also those that do not change what its JSON says: 1e-7 and 1E-7, \\u00e9 and \\u00E9."""
    content = manifest.build(
        {"é": FileRecord(0, "0" * 64)},
        source={},
        recipe={"small": 1e-7, "long": 0.30000000000000004, "large": 9007199254740993.0},
        format_name="dense",
        run={"seconds": 123456.78901234567},
    )
    path = tmp_path / manifest.NAME
    path.write_bytes(content)
    assert manifest.read(tmp_path)["recipe"]["small"] == 1e-7
    missed = []
    text = [content.index(b'"small"'), content.index(b'"files"'), content.index(b'"run"')]
    near = {start + n for start in text for n in range(90)}
    for place in range(len(content)):
        # Bit 5 is that of upper and lower case, bit 0 that of neighbouring digits.
        for bit in (0, 1, 5) if place in near else (5,):
            other = bytearray(content)
            other[place] ^= 1 << bit
            path.write_bytes(other)
            try:
                manifest.read(tmp_path)
            except VerifyError:
                continue
            missed.append((place, bit, bytes(other[place - 10 : place + 10])))
    assert missed == []


@pytest.mark.parametrize("part", ["source", "recipe", "run", "decoded"])
def test_a_manifest_with_parts_of_the_wrong_type_is_refused(tmp_path: Path, part: str) -> None:
    body = json.loads(manifest.build({}, source={}, recipe={}, format_name="dense", run={}))
    body[part] = {"w": 3} if part == "decoded" else []
    (tmp_path / manifest.NAME).write_text(json.dumps(body))
    with pytest.raises(InputError):
        manifest.load(tmp_path)


# -- what the values are -----------------------------------------------------------------------


def test_hashes_are_of_what_unpack_writes(made: dict[str, Path], tmp_path: Path) -> None:
    """In the manifest: every changed tensor; the dense checkpoint that unpack makes holds them."""
    recorded = json.loads((made["native"] / manifest.NAME).read_text())["decoded"]
    assert len(recorded) == 7  # the matrices of the one layer
    unpack_output(made["native"], tmp_path / "dense", fsync=False)
    from compress.checkpoint import open_checkpoint

    with open_checkpoint(tmp_path / "dense") as dense:
        found = {n: decoded_hashes.of_tensor(dense, dense.info(n)) for n in recorded}
    assert found == recorded


@pytest.mark.parametrize("name", ["reference", *dispatch.ISAS])
def test_every_instruction_set_decodes_alike(made: dict[str, Path], name: str) -> None:
    before = dispatch.current()
    try:
        dispatch._set_isa(name)
    except UsageError:
        pytest.skip(f"{name} is not available here")
    try:
        for kind in KINDS:
            assert verify_output(made[kind])["ok"]
    finally:
        dispatch._set_isa(before.backend.isa if before.native else "reference")


def test_another_decoder_is_found(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are what was written, and a reader that is off by one unit in the last place."""
    real = tensor.Codes.dequantize

    def off(self: tensor.Codes) -> np.ndarray:
        values = real(self)
        values[0, 0] = np.nextafter(values[0, 0], np.float32(9))
        return values

    monkeypatch.setattr(tensor.Codes, "dequantize", off)
    with pytest.raises(VerifyError, match="decode to other values"):
        verify_output(made["compressed-tensors"])


def rewritten(out: Path, name: str, content: bytes) -> None:
    """One file replaced and the manifest made to fit, as only this program could."""
    (out / name).write_bytes(content)
    body = json.loads((out / manifest.NAME).read_text())
    body.pop("digest")
    body.pop("decoded", None)
    body["files"][name] = vars(manifest.record_of(out, name)) | {}
    body["files"][name] = {
        "bytes": len(content),
        "sha256": manifest.record_of(out, name).sha256,
    }
    body["digest"] = manifest.digest_of(body)
    (out / manifest.NAME).write_text(json.dumps(body, indent=1) + "\n")


def test_a_scale_that_is_not_finite_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    """The codes of its group are all zero points' of pruned weights, so values may not show it."""
    out = tmp_path / "out"
    shutil.copytree(made["compressed-tensors"], out)
    with open_output(out) as checkpoint:
        where = checkpoint.stored.info("model.layers.0.mlp.up_proj.weight_scale")
    raw = bytearray((out / where.file).read_bytes())
    assert where.dtype == "F16"
    raw[where.offset : where.offset + 2] = np.float16(np.inf).tobytes()
    rewritten(out, where.file, bytes(raw))
    with pytest.raises(VerifyError, match=r"up_proj.weight_scale holds inf at flat index 0"):
        verify_output(out)


def test_the_source_shows_what_no_pass_touched(tmp_path: Path) -> None:
    """A consistent output whose untouched tensor is another: only the source tells."""
    model = tiny_llama(tmp_path / "model", hidden=32, ffn=32, layers=1, vocabulary=32)
    out = produce(model, tmp_path / "out", ["quantize:bits=4,group=32"], "compressed-tensors")
    assert verify_output(out, source=model)["untouched_compared"] == 4
    with open_output(out) as checkpoint:
        norm = checkpoint.stored.info("model.norm.weight")
    raw = bytearray((out / norm.file).read_bytes())
    raw[norm.offset] ^= 1
    rewritten(out, norm.file, bytes(raw))
    verify_output(out)
    with pytest.raises(VerifyError, match=r"model\.norm\.weight: untouched, but not equal"):
        verify_output(out, source=model)


def test_hashes_are_recorded_where_they_are_asked_for(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden=32, ffn=32, layers=1, vocabulary=32)
    words = ["run", model, "quantize:bits=4,group=32"]
    for name, more in {"with": ["--decoded-hashes"], "without": []}.items():
        assert tool(*words, "-o", tmp_path / name, *more).returncode == 0
    bodies = [json.loads((tmp_path / n / manifest.NAME).read_text()) for n in ("with", "without")]
    assert len(bodies[0].pop("decoded")) == 7
    assert bodies[0].keys() == bodies[1].keys()
    weights = [tree(tmp_path / n)["model.safetensors"] for n in ("with", "without")]
    assert weights[0] == weights[1]
