"""PyTorch files: container checks, the child process, and what it refuses to hand over."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import safetensors_bytes

from compress.checkpoint import open_checkpoint, torch_child, torch_file
from compress.checkpoint.source import Checkpoint
from compress.errors import InputError

torch = pytest.importorskip("torch")


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(path, allow_pickle=True)


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        opened(path).close()
    message = caught.value.message
    assert path.name in message and message.isprintable() and "weights_only" not in message
    return message


def no_child(*arguments: object, **options: object) -> None:
    """Stands in for subprocess.run where none may be started."""
    raise AssertionError("a child was started")


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_everything_that_a_state_dict_may_hold(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    state = OrderedDict(
        plain=shared,
        tied=shared,
        transposed=shared.t(),
        row=shared[1],
        half=torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        scalar=torch.tensor(7, dtype=torch.int64),
        empty=torch.empty(0, 5),
        mask=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.ones(2)),
        expanded=torch.zeros(1).expand(64, 64),
        epoch=3,
        note="x",
    )
    path = tmp_path / "model.pt"
    path.write_bytes(saved(state))
    with opened(path) as checkpoint:
        assert checkpoint.aliases == {"tied": "plain"}
        assert [i.name for i in checkpoint.infos() if i.shape != (0, 5)] == [
            n for n in state if n not in ("tied", "empty", "epoch", "note")
        ]
        for info in checkpoint.infos():
            assert (info.offset, info.file) == (-1, "model.pt")
            expected = state[info.name].detach().contiguous()
            assert info.shape == tuple(expected.shape)
            data = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert checkpoint.read(info).tobytes() == data
        assert any("epoch, note" in warning for warning in checkpoint.warnings)
        checkpoint.check_unchanged()
        assert len(checkpoint.content_hash()) == 64
        first = checkpoint.fingerprint()
    with opened(path) as checkpoint:
        assert checkpoint.fingerprint() == first


def test_the_older_format_and_wrappers(tmp_path: Path) -> None:
    path = tmp_path / "model.th"
    value = {"epoch": 5, "model": {"state_dict": {"fc.weight": torch.eye(3)}}}
    path.write_bytes(saved(value, _use_new_zipfile_serialization=False))
    with opened(path) as checkpoint:
        assert np.array_equal(checkpoint.read(checkpoint.info("fc.weight")), np.eye(3))
        assert any("model.state_dict" in warning for warning in checkpoint.warnings)


def test_a_published_checkpoint_in_the_older_format(shared_dir: Path) -> None:
    path = shared_dir / "models" / "resnet20-12fca82f.th"
    with opened(path) as checkpoint:
        names = [info.name for info in checkpoint.infos()]
        assert "module.conv1.weight" in names and "module.linear.bias" in names
        expected = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        assert names == list(expected)
        for info in checkpoint.infos():
            assert np.array_equal(checkpoint.read(info), expected[info.name].numpy())


def test_a_directory_with_bin_shards(tmp_path: Path) -> None:
    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    shared = torch.ones(2, 2)
    (tmp_path / first).write_bytes(saved({"a": shared, "tied": shared}))
    (tmp_path / second).write_bytes(saved({"b": torch.zeros(2)}))
    (tmp_path / "training_args.bin").write_bytes(b"never opened")
    weight_map = {"a": first, "tied": first, "b": second}
    index = {"metadata": {"total_size": 40}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path)
    assert "--allow-pickle" in (caught.value.hint or "")
    with opened(tmp_path) as checkpoint:
        assert [(i.name, i.file) for i in checkpoint.infos()] == [("a", first), ("b", second)]
        assert checkpoint.aliases == {"tied": "a"}
        assert checkpoint.sidecars == []


def test_a_structure_inside_the_state_dict_is_not_dropped(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(saved({"w": torch.ones(2), "inner": {"v": torch.ones(2)}}))
    assert "tensor 'inner': not a tensor but a structure that holds tensors" in refused(path)


@pytest.mark.filterwarnings("ignore")
def test_special_tensors_are_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", no_child)
    path = tmp_path / "model.pt"
    for value, word in (
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (torch.ones(2, device="meta"), "without data"),
    ):
        path.write_bytes(saved({"w": value}))
        assert word in refused(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: {"w": torch.eye(2).to_sparse()}, "layout"),
        (lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "quantized"),
        (lambda: {"w": torch.ones(2, device="meta")}, "meta"),
        (lambda: {"w": torch.zeros(1).expand(1 << 20)}, "expanded"),
        (lambda: {"w": torch.ones(2), "inner": [{"v": (torch.ones(2),)}]}, "nested"),
        (lambda: {"w": torch.ones(2), 3: torch.ones(2)}, "keys"),
        (lambda: {"w": torch.ones(2), "__metadata__": torch.ones(2)}, "reserved"),
        (lambda: {"w": torch.ones(2, dtype=torch.complex128)}, "dtype"),
        (lambda: {"w": torch.ones(2, dtype=torch.complex64).conj()}, "kind"),
        (lambda: {"w": torch.ones([1] * 65)}, "rank"),
        (lambda: [torch.ones(2)], "no_state_dict"),
        (lambda: {"epoch": 3, "model": {"module": {"net": {"ema": {"w": torch.ones(1)}}}}},
         "no_state_dict"),
    ],
)  # fmt: skip
def test_what_the_child_refuses(make: Callable[[], Any], code: str) -> None:
    with pytest.raises(torch_child.Refused) as caught:
        torch_child.select(torch_child.find_state_dict(make())[0])
    assert caught.value.code == code
    assert code in torch_file.REASONS


def test_a_structure_that_shares_its_parts_is_walked_once() -> None:
    level: list[Any] = ["x"] * 10
    for _ in range(40):
        level = [level] * 10
    assert not torch_child.holds_tensor(level)
    level[3] = torch.ones(1)
    assert torch_child.holds_tensor(level)


def rewrite(data: bytes, **changes: Any) -> bytes:
    """The same archive with members added, renamed or compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            how = zipfile.ZIP_DEFLATED if changes.get("deflate") else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(member.filename), old.read(member), how)
        for name in changes.get("add", ()):
            new.writestr(zipfile.ZipInfo(name), b"x")
        new.comment = changes.get("comment", b"")
    return out.getvalue()


GOOD = saved({"w": torch.ones(64)})


def test_a_rewritten_archive_is_still_good(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(rewrite(GOOD))
    with opened(path) as checkpoint:
        assert len(checkpoint.infos()) == 1


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (rewrite(GOOD, deflate=True), "compressed"),
        (rewrite(GOOD, add=["../../canary"]), "not a plain path"),
        (rewrite(GOOD, add=["/etc/passwd"]), "not a plain path"),
        (rewrite(GOOD, add=["archive/a\\b"]), "not a plain path"),
        (rewrite(GOOD, add=["other/x"]), "not laid out"),
        (rewrite(GOOD, add=["archive/constants.pkl"]), "TorchScript"),
        (rewrite(GOOD, comment=b"hello"), "after the end"),
        (GOOD + b"tail", "after the end"),
        (b"PK\x03\x04" + GOOD, "overlaps"),
        (GOOD[: len(GOOD) // 2], "damaged"),
        (b"\x80\x02}q\x00.", "two formats"),
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (safetensors_bytes({"w": ("U8", [1], b"x")}), "safetensors"),
    ],
    ids=["deflate", "traversal", "absolute", "backslash", "two-tops", "torchscript", "comment",
         "tail", "prefix", "half", "bare-pickle", "empty", "lfs", "safetensors"],
)  # fmt: skip
def test_containers_that_are_refused_without_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, word: str
) -> None:
    monkeypatch.setattr(subprocess, "run", no_child)
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    assert word in refused(path)


def test_globals_of_a_pickle_are_named(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "canary"),)

    path = tmp_path / "model.pt"
    path.write_bytes(saved({"w": Evil()}))
    assert "mkdir" in refused(path)
    path.write_bytes(saved({"w": Evil()}, _use_new_zipfile_serialization=False))
    assert "not a plain state dict" in refused(path)
    assert not (tmp_path / "canary").exists()


def test_the_package_never_unpickles_outside_the_child() -> None:
    """No pickle, no plain torch.load, no eval in what opens files."""
    package = Path(sys.modules[Checkpoint.__module__].__file__ or "").parent
    for source in package.glob("*.py"):
        text = source.read_text()
        assert "import pickle\n" not in text and "eval(" not in text
        assert text.count("torch.load(") <= (1 if source.name == "torch_child.py" else 0)
