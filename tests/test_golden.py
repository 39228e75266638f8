"""Outputs of every released version verify, load and unpack to the same bits, for ever.

tests/golden/make.py made them; docs/compatibility.md says when it may. What they hold is compared
by hashes that lie beside them, through a reader of safetensors that is not the one under test.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import reading
from golden.reading import HERE, STATISTICS, expected_of, header_of
from toolbox import tool

from compress import formats
from compress.calibrate import statistics
from compress.checkpoint import manifest
from compress.errors import InputError
from compress.formats import metadata
from compress.inspection import inspect_model
from compress.output import open_any
from compress.unpacking import unpack_output
from compress.verification import verify_output

OUTPUTS = reading.outputs()
each = pytest.mark.parametrize("folder", OUTPUTS, ids=lambda folder: folder.name)


@each
def test_it_verifies_and_unpacks_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    out, expected = folder / "out", expected_of(folder)
    assert verify_output(out)["ok"]
    assert inspect_model(out)["tensors"]
    with open_any(out) as checkpoint:
        shown = {info.name: [info.dtype, list(info.shape)] for info in checkpoint.infos()}
    assert shown == {n: [e["dtype"], e["shape"]] for n, e in expected["tensors"].items()}
    plain = tmp_path / "plain"
    unpack_output(out, plain, fsync=False)
    found = reading.contents(reading.weight_files(plain))
    assert found["tensors"] == expected["tensors"]
    assert found["metadata"] == expected["metadata"]
    assert verify_output(plain)["ok"]


@pytest.mark.parametrize("folder", [f for f in OUTPUTS if "graphs" in expected_of(f)],
                         ids=lambda folder: folder.name)  # fmt: skip
def test_its_graphs_give_the_same_outputs(folder: Path, tmp_path: Path) -> None:
    """The one beside the weights, and the one over plain weights that `unpack` makes."""
    unpack_output(folder / "out", tmp_path / "plain", fsync=False)
    graphs = {"out": folder / "out" / "model.onnx", "plain": tmp_path / "plain" / "model.onnx"}
    expected = expected_of(folder)["graphs"]
    assert expected.keys() == {name for name, graph in graphs.items() if graph.exists()}
    for name, values in expected.items():
        # Products with activations of 8 bits differ between processors.
        bound = (1e-5 if name == "plain" else 0.02) * max(map(abs, values))
        np.testing.assert_allclose(reading.graph_output(graphs[name]), values, rtol=0, atol=bound)


@each
def test_its_versions_are_those_of_its_name(folder: Path) -> None:
    """The number in a folder's name is the record's; without a record, the manifest's."""
    found, expected = reading.stored_versions(folder / "out"), expected_of(folder)
    assert found == {key: expected[key] for key in found}
    name, _, number = folder.name.rpartition("-")
    deciding = found["manifest"] if found["record"] is None else found["record"]
    assert name.startswith(found["format"]) and int(number) == deciding


def test_every_version_that_is_read_has_goldens() -> None:
    versions = [expected_of(folder) for folder in OUTPUTS]
    written = {(one["format"], one["record"]) for one in versions}
    with_record = [name for name in formats.NAMES if name != "dense"]
    assert written >= {(name, number) for name in with_record for number in metadata.READS}
    assert {one["manifest"] for one in versions} == set(manifest.READS)
    assert ("dense", None) in written
    kept = {expected_of(path.parent)["statistics"] for path in HERE.glob(f"*/{STATISTICS}")}
    assert kept == set(statistics.READS)
    for module in (metadata, manifest, statistics):
        assert max(module.READS) == module.VERSION


def test_goldens_have_every_kind_of_codes_and_terms() -> None:
    """What a version can hold is all in there, so that no part of a reader goes untried."""
    records = [record for folder in OUTPUTS for record in _records(folder / "out")]
    assert {r["bits"] for r in records if "bits" in r} == set(range(2, 9))
    assert {(r["bits"], r["symmetric"]) for r in records if "bits" in r} >= {
        (bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)
    }
    assert {r.get("scale_dtype") for r in records} >= {"F16", "BF16", "F32"}
    assert {r.get("factor_dtype") for r in records} >= {"F16", "I8"}
    assert {r["role"] for r in records} >= {"linear", "conv", "conv1d", "experts", "embedding"}
    assert {r["dtype"] for r in records} >= {"F64", "F32", "F16", "BF16"}
    for part in ("per_tensor", "outliers", "nonzeros", "rank"):
        assert any(part in r for r in records), part
    arrays = {
        name.rpartition(".")[2]
        for folder in OUTPUTS
        for path in (folder / "out").rglob("*.safetensors")
        for name in header_of(path)[0]
    }
    assert arrays >= {
        "mask", "codes", "values", "scale", "zero_point", "factor_a", "factor_b", "factor_a_scale",
        "factor_b_scale", "weight_packed", "weight_scale", "weight_shape", "rows", "columns",
    }  # fmt: skip
    names = {path.name for folder in OUTPUTS for path in (folder / "out").iterdir()}
    assert names >= {
        "adapter", "super_weights.safetensors", "graph.onnx", "model.onnx",
        "model.onnx.data", "model.compress.safetensors.index.json",
    }  # fmt: skip


def _records(out: Path) -> list[dict[str, Any]]:
    texts = [header_of(p)[0]["__metadata__"].get("compress") for p in reading.weight_files(out)]
    return [one for text in texts if text for one in json.loads(text)["tensors"].values()]


@pytest.mark.parametrize("number", statistics.READS)
def test_statistics_are_read(number: int, tmp_path: Path) -> None:
    """Every array of every site and tensor, by the reader's own methods."""
    folder = HERE / f"statistics-{number}"
    expected = expected_of(folder)["tensors"]
    read: dict[str, np.ndarray] = {}
    with statistics.open_statistics(folder / STATISTICS) as known:
        assert {"second_moment", "held_out"} <= known.record.kinds
        for site in known.record.sites:
            assert site.count > 0 and site.tensors
            keys = [site.key(kind) for kind in known.record.kinds]
            read |= {key: known.array(key) for key in keys if known.has_array(key)}
    hashes = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in read.items()}
    assert hashes == {key: entry["sha256"] for key, entry in expected.items()}


def test_a_record_of_a_future_version_is_refused(tmp_path: Path) -> None:
    out = _copy(HERE / "native-values-1", tmp_path)
    path = out / "model.compress.safetensors"
    header, data = header_of(path)
    record = json.loads(header["__metadata__"]["compress"])
    header["__metadata__"]["compress"] = json.dumps(record | {"version": 2})
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    _rewrite_manifest(out)
    plain = tmp_path / "plain"
    for code, words in (
        (3, ["inspect", out]),
        (3, ["unpack", out, "-o", plain]),
        (5, ["verify", out]),
    ):
        _refused(code, words)
    assert not plain.exists()


@pytest.mark.parametrize("name", ["dense-1", "native-values-1"])
def test_a_manifest_of_a_future_version_is_refused(name: str, tmp_path: Path) -> None:
    """By what reads it: the weights of an output with a record are decoded without it."""
    out = _copy(HERE / name, tmp_path)
    _rewrite_manifest(out, manifest_version=2)
    _refused(5, ["verify", out])
    if name == "dense-1":
        _refused(3, ["unpack", out, "-o", tmp_path / "plain"])
    if name == "native-values-1":
        _refused(3, ["export", out, "--to", "onnx"])


def test_statistics_of_a_future_version_are_refused(tmp_path: Path) -> None:
    header, data = header_of(HERE / "statistics-1" / STATISTICS)
    record = json.loads(header["__metadata__"][statistics.KEY])
    header["__metadata__"][statistics.KEY] = json.dumps(record | {"version": 2})
    text = json.dumps(header).encode()
    path = tmp_path / STATISTICS
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(InputError, match="version 2, this program reads up to 1"):
        statistics.open_statistics(path)


def _copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "out", tmp_path / "future"))


def _rewrite_manifest(out: Path, **changes: Any) -> None:
    """The manifest over the files as they are, with other fields, its digest right."""
    body = json.loads((out / manifest.NAME).read_text()) | changes
    body.pop("digest")
    for name in body["files"]:
        found = manifest.record_of(out, name)
        body["files"][name] = {"bytes": found.nbytes, "sha256": found.sha256}
    whole = body | {"digest": manifest.digest_of(body)}
    (out / manifest.NAME).write_text(json.dumps(whole, indent=1) + "\n")


def _refused(code: int, words: list[str | Path]) -> None:
    """One line that says version and limit, a hint, the documented exit code."""
    done = tool(*words)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    message, hint = done.stderr.strip().splitlines()
    assert "version 2, this program reads up to 1" in message
    assert hint == "hint: a newer version of this program wrote it"
