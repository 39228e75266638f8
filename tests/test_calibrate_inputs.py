"""What calibration and evaluation read: windows, documents, sentences, ids, images; bad files."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from models_with_words import add_words, reading_bert, talking_llama, words
from toolbox import tiny_llama

from compress.calibrate import peaks
from compress.calibrate.data import list_ids, read_pairs, sentence_ids, text_ids
from compress.calibrate.inputs import (
    Inputs,
    batches_of,
    positions_of,
    read_ids,
    read_images,
    split,
)
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.errors import InputError, UsageError

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    with open_checkpoint(talking_llama(tmp_path_factory.mktemp("d") / "m", layers=1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    with open_checkpoint(reading_bert(tmp_path_factory.mktemp("e"))) as opened:
        yield opened


def written(folder: Path, text: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---------------------------------------------------------------- text


def test_windows_follow_each_other_and_begin_with_the_bos(
    decoder: Checkpoint, tmp_path: Path
) -> None:
    path = written(tmp_path, words(100, 96))
    plain = [int(word[1:]) for word in path.read_text().split()]
    ids = text_ids(path, decoder, length=11).arrays["input_ids"]
    assert ids.shape == (10, 11) and ids.dtype == np.int32
    assert (ids[:, 0] == 0).all()
    assert ids[:, 1:].ravel().tolist() == plain


def test_a_tokenizer_without_a_bos_gets_none(tmp_path: Path) -> None:
    with open_checkpoint(talking_llama(tmp_path / "m", layers=1, bos=False)) as model:
        path = written(tmp_path, "w5 w6 w7 w8")
        assert text_ids(path, model, length=2).arrays["input_ids"].tolist() == [[5, 6], [7, 8]]


def test_an_encoder_gets_what_its_tokenizer_puts_around(
    encoder: Checkpoint, tmp_path: Path
) -> None:
    path = written(tmp_path, "w5 w6 w7 w8 w9")
    ids = text_ids(path, encoder, length=4).arrays["input_ids"]
    assert ids.tolist() == [[0, 5, 6, 1], [0, 7, 8, 1]]


def test_windows_are_drawn_by_seed_and_kept_in_order(decoder: Checkpoint, tmp_path: Path) -> None:
    path = written(tmp_path, words(400, 96))
    whole = text_ids(path, decoder, length=5).arrays["input_ids"].tolist()
    first = text_ids(path, decoder, length=5, samples=7)
    drawn = text_ids(path, decoder, length=5, samples=7, seed=3)
    assert first.arrays["input_ids"].tolist() == whole[:7]
    places = [whole.index(row) for row in drawn.arrays["input_ids"].tolist()]
    assert places == sorted(places) and places != list(range(7))
    assert drawn.digest == text_ids(path, decoder, length=5, samples=7, seed=3).digest
    assert drawn.digest != text_ids(path, decoder, length=5, samples=7, seed=4).digest
    assert drawn.file_sha256 == first.file_sha256


def test_documents_are_cut_at_blank_lines(decoder: Checkpoint, tmp_path: Path) -> None:
    path = written(tmp_path, "w5 w6\nw7\n\nw8 w9 w10 w11\r\n \r\n\r\nw12\n")
    made = text_ids(path, decoder, length=4, documents=True)
    assert made.arrays["input_ids"].tolist() == [[0, 5, 6, 7], [0, 8, 9, 10], [0, 12, -1, -1]]
    assert (made.kind, made.tokens, made.lengths.tolist()) == ("documents", 10, [4, 4, 2])


def test_sentences_of_lines_and_of_pairs_are_the_same(encoder: Checkpoint, tmp_path: Path) -> None:
    lines = written(tmp_path, "w5 w6\nw7\n\nw5 w6\nw8 w9\n")
    pairs = written(tmp_path, 'w5 w6,w7,1.5\nw5 w6,"w8 w9",4\n', "pairs.csv")
    made = sentence_ids(lines, encoder)
    assert made.arrays["input_ids"].tolist() == [[0, 5, 6, 1], [0, 7, 1, -1], [0, 8, 9, 1]]
    assert sentence_ids(pairs, encoder).digest == made.digest
    assert read_pairs(pairs)[2].tolist() == [1.5, 4.0]
    assert list_ids(["w7", "w7"], encoder) == [[0, 7, 1], [0, 7, 1]]


def test_batches_hold_samples_of_one_length_once_each() -> None:
    rows = np.full((5, 4), -1, np.int32)
    for row, length in enumerate((2, 4, 2, 4, 2)):
        rows[row, :length] = row
    made = list(batches_of({"input_ids": rows}, tokens=5))
    assert [numbers for numbers, _ in made] == [[0, 2], [4], [1], [3]]
    assert made[0][1]["input_ids"].tolist() == [[0, 0], [2, 2]]
    assert [n for n, _ in batches_of({"input_ids": rows}, 99, [4, 1])] == [[4], [1]]


def test_what_runs_the_inputs_again_leaves_the_filling_out() -> None:
    rows = np.array([[5, 6, 7], [8, -1, -1]], np.int32)
    given = peaks._samples({"input_ids": rows})
    assert [one["input_ids"].tolist() for one in given] == [[[5, 6, 7]], [[8]]]


def test_every_fifth_sample_is_kept_apart() -> None:
    assert split(1) == ([0], [])
    assert split(3) == ([0, 1], [2])
    assert split(11)[1] == [4, 9]


@pytest.mark.parametrize(
    ("text", "options", "error", "said"),
    [
        (" \n", {}, UsageError, "0 tokens"),
        ("w5 w6 w7", {"length": 5}, UsageError, "3 tokens; one sample of 5 needs 4"),
        ("w5 w6 w7", {}, UsageError, "one sample of 128 needs 127"),
        ("w5 w6 w7", {"length": 129}, UsageError, "the model has 128 positions"),
        ("w5 w6 w7", {"length": 1}, UsageError, "too short"),
        (b"w5 \xff", {}, InputError, "byte 3 is no UTF-8"),
    ],
)
def test_bad_texts(
    decoder: Checkpoint, tmp_path: Path, text: Any, options: Any, error: Any, said: str
) -> None:
    with pytest.raises(error, match=said):
        text_ids(written(tmp_path, text), decoder, **options)


def test_a_tokenizer_of_another_model_is_named_by_its_id(tmp_path: Path) -> None:
    folder = add_words(tiny_llama(tmp_path / "m", layers=1), 200)
    path = written(tmp_path, "w5 w6 w7 w150")
    with open_checkpoint(folder) as model, pytest.raises(InputError) as caught:
        text_ids(path, model, length=2)
    assert "token id 150 (sample 1, place 1)" in str(caught.value)
    assert "vocabulary of 96" in str(caught.value)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    path = written(tmp_path, "w5 w6 w7")
    folder = tiny_llama(tmp_path / "m", layers=1)
    with open_checkpoint(folder) as model, pytest.raises(InputError, match="no tokenizer"):
        text_ids(path, model)
    with (
        open_checkpoint(folder / "model.safetensors") as model,
        pytest.raises(InputError, match="a lone file"),
    ):
        text_ids(path, model)


def test_a_missing_text(decoder: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.txt"):
        text_ids(tmp_path / "nothing.txt", decoder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b,1\na,b\n", "line 2: 2 fields"),
        ("a,b,1\n\na,b,x\n", "line 3: 'x' is no score"),
        ("a,b,nan\n", "'nan' is no score"),
        ('a,"b,1\n', "line 1"),
        ("\n\n,", "line 3: 2 fields"),
    ],
)
def test_bad_pairs(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_pairs(written(tmp_path, text, "pairs.csv"))


def test_positions_behind_padding() -> None:
    roberta = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert positions_of(roberta) == 512
    assert positions_of({"text_config": {"max_position_embeddings": 99}}) == 99
    assert positions_of(None) is None


# ---------------------------------------------------------------- arrays


def saved(path: Path, values: Any) -> Path:
    np.save(path, values, allow_pickle=True)
    return path


def test_ids_from_a_file(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint16).reshape(4, 3)
    made = read_ids(saved(tmp_path / "ids.npy", values), {"vocab_size": 12}, samples=3)
    assert made.arrays["input_ids"].dtype == np.int32
    assert made.arrays["input_ids"].tolist() == values[:3].tolist()


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        (np.zeros((2, 3)), InputError, r"float64 \[2, 3\], not integers"),
        (np.zeros(3, int), InputError, r"int64 \[3\]"),
        (np.zeros((0, 3), int), InputError, r"\[0, 3\]"),
        (np.array([[1, 2], [3, -4]]), InputError, r"id -4 \(sample 1\)"),
        (np.array([[1, 1 << 40]]), InputError, "id 1099511627776"),
        (np.array([[1, 2], [3, 12]]), InputError, r"id 12 \(sample 1, place 1\)"),
        (np.zeros((1, 9), int), UsageError, "8 positions"),
        (np.array([[None]]), InputError, "not an .npy file of numbers"),
    ],
)
def test_bad_ids(tmp_path: Path, values: Any, error: Any, said: str) -> None:
    config = {"vocab_size": 12, "max_position_embeddings": 8}
    with pytest.raises(error, match=said):
        read_ids(saved(tmp_path / "ids.npy", values), config)


def test_ids_that_are_no_array(tmp_path: Path) -> None:
    for content in (
        b"",
        b"hello",
        saved(tmp_path / "a.npy", np.zeros((2, 2), int)).read_bytes()[:140],
    ):
        with pytest.raises(InputError, match=r"not an \.npy"):
            read_ids(written(tmp_path, content, "ids.npy"), None)


def archive(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_images_from_a_file(tmp_path: Path) -> None:
    images = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    made = read_images(archive(tmp_path / "i.npz", images=images, labels=np.arange(5)), samples=2)
    assert made.arrays["images"].tolist() == images[:2].tolist()
    assert made.arrays["labels"].tolist() == [0, 1]
    assert (made.samples, made.tokens) == (2, 2)
    assert [numbers for numbers, _ in made.batches(1)] == [[0], [1]]


GOOD = np.zeros((2, 5, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"pictures": GOOD}, "no array named images"),
        ({"images": GOOD.astype(np.float32)}, "float32"),
        ({"images": GOOD.transpose(0, 3, 1, 2)}, r"\[2, 3, 5, 5\], not uint8"),
        ({"images": GOOD[0]}, r"\[5, 5, 3\]"),
        ({"images": GOOD[:0]}, "no images"),
        ({"images": GOOD, "labels": np.zeros(3, int)}, r"labels are int64 \[3\], not 2"),
        ({"images": GOOD, "labels": np.zeros(2)}, "labels are float64"),
        ({"images": np.array([None])}, "not an .npz file of numbers"),
    ],
)
def test_bad_images(tmp_path: Path, arrays: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_images(archive(tmp_path / "i.npz", **arrays))


def test_images_that_are_no_archive(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("images.npy", b"no array")
    whole = archive(tmp_path / "good.npz", images=GOOD).read_bytes()
    for content in (b"hello", buffer.getvalue(), whole[:-30]):
        with pytest.raises(InputError, match=r"not an \.npz file of numbers"):
            read_images(written(tmp_path, content, "i.npz"))
    single = saved(tmp_path / "single.npy", GOOD)
    with pytest.raises(InputError, match=r"not an \.npz"):
        read_images(single)


def test_the_digest_tells_arrays_apart() -> None:
    one = Inputs("ids", {"input_ids": np.array([[1, 2]], np.int32)}, "", "")
    other = Inputs("ids", {"input_ids": np.array([[1], [2]], np.int32)}, "", "")
    assert one.digest != other.digest


# ---------------------------------------------------------------- files that lie, and no files


def npy(header: str, body: bytes = b"", version: int = 1) -> bytes:
    raw = header.encode("latin-1")
    raw += b" " * (-(len(raw) + 11) % 64) + b"\n"
    width = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + len(raw).to_bytes(width, "little") + raw + body


def heading(shape: str, descr: str = "'<i4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


ODD_HEADERS = {
    "unhashable": "{[]: 1}",
    "mixed keys": "{1: 1, 'a': 2}",
    "cut off": "{'a': (((",
    "no dict": "5",
    "too deep": "-" * 9000 + "1",
    "brackets": "[" * 150 + "]" * 150,
    "vast": heading("(1000000000000, 1000000)"),
    "large": heading("(10000000, 100000)"),
    "beyond 64 bits": heading(f"({'9' * 400}, 1)"),
    "below zero": heading("(-2, -4)"),
    "a flag as size": heading("(True, 4)"),
    "a float as size": heading("(1.0, 1)"),
    "empty and vast": heading("(0, 9223372036854775808)"),
    "structured": heading("(1, 1)", "[('a', '<i4')]"),
    "objects": heading("(1, 1)", "'O'"),
    "nothing": heading("(1, 1)", "'V0'"),
    "odd width": heading("(1, 1)", "'<i3'"),
    "old and cut": "{'descr':'<i4',\n  'x\n':1L",
}


@pytest.mark.parametrize("odd", ODD_HEADERS)
@pytest.mark.filterwarnings("error")
def test_headers_of_arrays_that_are_not_there(tmp_path: Path, odd: str) -> None:
    """Nothing is allocated for them, and the file is named."""
    content = npy(ODD_HEADERS[odd], b"\1\0\0\0" * 8)
    with pytest.raises(InputError, match=r"ids\.npy: not an \.npy file of numbers"):
        read_ids(written(tmp_path, content, "ids.npy"), None)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("images.npy", content)
    with pytest.raises(InputError, match=r"i\.npz: not an \.npz file of numbers"):
        read_images(written(tmp_path, made.getvalue(), "i.npz"))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_arrays_of_every_version_and_order(tmp_path: Path, version: int) -> None:
    values = np.arange(6, dtype=">i2").reshape(2, 3)
    content = npy(heading("(2L, 3L)", "'>i2'"), values.tobytes(), version)
    assert read_ids(written(tmp_path, content), None).arrays["input_ids"].tolist() == (
        values.tolist()
    )
    turned = saved(tmp_path / "turned.npy", np.asfortranarray(values.astype(np.int64)))
    assert read_ids(turned, None).arrays["input_ids"].tolist() == values.tolist()
    packed = tmp_path / "packed.npz"
    np.savez_compressed(packed, images=GOOD, labels=np.arange(len(GOOD)))
    assert np.array_equal(read_images(packed).arrays["images"], GOOD)


def tampered(**changed: int) -> bytes:
    """A good archive with fields of its two headers changed."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("images.npy", npy(heading("(2, 4, 4, 3)", "'|u1'"), bytes(96)))
    content = bytearray(made.getvalue())
    central = content.find(b"PK\1\2")
    local = {"flags": 6, "method": 8}
    there = {"version": 6, "flags": 8, "method": 10, "size": 24}
    for name, value in changed.items():
        width = 4 if name == "size" else 2
        place = central + there[name]
        content[place : place + width] = value.to_bytes(width, "little")
        if name in local:
            content[local[name] : local[name] + 2] = value.to_bytes(2, "little")
    return bytes(content)


@pytest.mark.parametrize(
    "changed",
    [
        {"flags": 1},
        {"flags": 0x20},
        {"version": 200},
        {"size": 0xFFFFFFF0},
        *[{"method": method} for method in (8, 12, 14, 99)],
    ],
    ids=str,
)
def test_archives_that_numpy_does_not_write(tmp_path: Path, changed: dict[str, int]) -> None:
    read_images(written(tmp_path, tampered(), "good.npz"))
    with pytest.raises(InputError, match=r"i\.npz: not an \.npz file of numbers"):
        read_images(written(tmp_path, tampered(**changed), "i.npz"))


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(
    decoder: Checkpoint, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (
        lambda p: read_ids(p, None),
        read_images,
        read_pairs,
        lambda p: text_ids(p, decoder),
    ):
        with pytest.raises(InputError, match=r"pipe: not a regular file"):
            read(pipe)
        with pytest.raises(InputError, match="/dev/null: not a regular file"):
            read(Path("/dev/null"))
        with pytest.raises(UsageError, match="Is a directory"):
            read(tmp_path)


def test_a_text_may_come_from_a_pipe_of_the_shell() -> None:
    end, begin = os.pipe()
    os.write(begin, b"one,two,0.5\n")
    os.close(begin)
    assert read_pairs(Path(f"/dev/fd/{end}"))[0] == ["one"]
    with pytest.raises(InputError, match=f"/dev/fd/{end}: not a regular file"):
        read_images(Path(f"/dev/fd/{end}"))
    os.close(end)
