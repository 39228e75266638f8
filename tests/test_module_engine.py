"""A user's own torch module: found, filled, refused, and what calibration collects of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toolbox import write_safetensors
from torch.nn import functional

from compress.calibrate.calibrate import Request
from compress.calibrate.inputs import Inputs
from compress.calibrate.module import collect_module
from compress.calibrate.statistics import (
    HELD_OUT,
    MEAN,
    OUTPUT_FISHER,
    SECOND_MOMENT,
    Record,
    Statistics,
    open_statistics,
)
from compress.calibrate.writer import StatisticsWriter, header_room
from compress.checkpoint import open_checkpoint
from compress.engines.module import UserModule, load_module, run_images
from compress.errors import InputError, UsageError
from compress.evaluate.outputs import Module
from compress.run import silent

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.relu = nn.ReLU(inplace=True)
        self.a = nn.Linear(6, 5)
        self.b = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        x = self.relu(self.conv(x)).mean((2, 3))
        return self.a(x) + self.b(x)


def preprocess(images):
    return images.permute(0, 3, 1, 2).float() / 100


def net():
    return Net()


def fails():
    raise RuntimeError("no such thing\\nsecond line")


def seven():
    return 7


def lazy():
    return nn.Sequential(nn.LazyLinear(3))


class Overwriting(Net):
    def forward(self, x):
        y = self.conv(x)
        x.zero_()
        return self.a(y.mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.c = nn.Linear(6, 5, bias=False)
        self.c.weight = self.a.weight
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "conv.weight": (6, 2, 3, 3),
        "conv.bias": (6,),
        "a.weight": (5, 6),
        "a.bias": (5,),
        "b.weight": (5, 6),
    }
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


Loader = Callable[..., UserModule]


@pytest.fixture
def load(tmp_path: Path, source: Path, weights: dict[str, np.ndarray]) -> Loader:
    def load(factory: str = "net", tensors: dict[str, np.ndarray] | None = None) -> UserModule:
        path = tmp_path / "m.safetensors"
        write_safetensors(path, weights if tensors is None else tensors)
        with open_checkpoint(path) as checkpoint:
            return load_module(f"{source}:{factory}", checkpoint)

    return load


IMAGES = np.random.default_rng(1).integers(0, 255, (10, 6, 6, 4), dtype=np.uint8)


def forward(weights: dict[str, np.ndarray], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled features, logits) by functions alone."""
    w = {name: torch.from_numpy(v) for name, v in weights.items()}
    y = functional.conv2d(x, w["conv.weight"], w["conv.bias"], 2, 1, groups=2)
    pooled = torch.relu(y).mean((2, 3))
    return pooled, pooled @ (w["a.weight"] + w["b.weight"]).T + w["a.bias"]


def prepared(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 100


@pytest.mark.parametrize("prefix", ["", "module.", "net.encoder."])
def test_weights_are_matched_by_name_behind_any_prefix(
    load: Loader, weights: dict[str, np.ndarray], prefix: str
) -> None:
    stored = {prefix + name: v.astype(np.float16) for name, v in weights.items()}
    model = load(tensors=stored)
    assert model.stored == {name: prefix + name for name in weights}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training and not model.inner.training
    halves = {name: v.astype(np.float16).astype(np.float32) for name, v in weights.items()}
    wanted = forward(halves, prepared(IMAGES))[1]
    torch.testing.assert_close(run_images(model, IMAGES, 3), wanted)


def test_an_evaluation_runs_the_users_preprocessing(
    load: Loader, weights: dict[str, np.ndarray]
) -> None:
    (made,) = Module(load(), "here").run([{"images": IMAGES}])
    torch.testing.assert_close(made, forward(weights, prepared(IMAGES))[1])


def test_without_a_preprocessing_of_its_own_images_are_scaled_to_one() -> None:
    model = UserModule(torch.nn.Identity(), "m.py:f")
    values = model.prepare(IMAGES)
    assert values.shape == (10, 4, 6, 6)
    assert float(values.max()) == IMAGES.max() / np.float32(255)


def test_a_tied_weight_may_be_stored_once(load: Loader, weights: dict[str, np.ndarray]) -> None:
    model = load("Tied", {name: weights[name] for name in ("a.weight", "a.bias")})
    assert model.stored["c.weight"] == "a.weight"
    assert torch.equal(model.inner.c.weight, torch.from_numpy(weights["a.weight"]))


def test_a_module_takes_the_weights_of_another_checkpoint(
    load: Loader, tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    model = load()
    assert sorted(model.weights()) == ["a.weight", "b.weight", "conv.weight"]
    write_safetensors(tmp_path / "other.safetensors", {n: 2 * v for n, v in weights.items()})
    with open_checkpoint(tmp_path / "other.safetensors") as other:
        model.fill(other)
    assert torch.equal(model.inner.a.weight, 2 * torch.from_numpy(weights["a.weight"]))


def test_a_missing_or_misshapen_tensor_is_named(
    load: Loader, weights: dict[str, np.ndarray]
) -> None:
    with pytest.raises(InputError, match=r"no tensor module\.a\.bias"):
        load(tensors={f"module.{n}": v for n, v in weights.items() if n != "a.bias"})
    with pytest.raises(InputError, match=r"a\.weight is \[6, 5\].*wants \[5, 6\]"):
        load(tensors=weights | {"a.weight": weights["a.weight"].T})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("net.py", "expected FILE.py:FACTORY"),
        ("net.txt:net", "expected FILE.py:FACTORY"),
        ("gone.py:net", "no file gone.py"),
        ("net.py:nothing", "has no function nothing"),
        ("net.py:fails", r"fails\(\) fails: RuntimeError: no such thing$"),
        ("net.py:seven", "made int, no torch.nn.Module"),
        ("net.py:lazy", r"lazy\(\) fails: ValueError: .*uninitialized parameter"),
        ("broken.py:net", "it fails: ZeroDivisionError: division by zero"),
        ("leaves.py:net", "it fails: SystemExit: 3"),
    ],
)
def test_what_is_no_module_is_refused_in_one_line(
    tmp_path: Path, source: Path, weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch,
    spec: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    write_safetensors(tmp_path / "m.safetensors", weights)
    with (
        open_checkpoint(tmp_path / "m.safetensors") as checkpoint,
        pytest.raises(UsageError, match=message) as caught,
    ):
        load_module(spec, checkpoint)
    assert "\n" not in caught.value.message


def test_a_module_that_refuses_the_images_says_so_in_one_line(load: Loader) -> None:
    with pytest.raises(UsageError, match=r"net\.py:net: the module fails on an input \[10, 3, 6"):
        run_images(load(), IMAGES[..., :3])
    lossy = UserModule(torch.nn.Identity(), "m.py:f", lambda images: images[:2])
    with pytest.raises(UsageError, match=r"preprocess made \[2, 6, 6, 4\] of 10 images"):
        run_images(lossy, IMAGES)


def collected(
    tmp_path: Path, source: Path, weights: dict[str, np.ndarray], factory: str = "net",
    kinds: tuple[str, ...] = (SECOND_MOMENT, HELD_OUT, MEAN, OUTPUT_FISHER), **more: Any,
) -> Statistics:  # fmt: skip
    path = tmp_path / "m.safetensors"
    write_safetensors(path, weights)
    names = ["conv.weight", "a.weight", "b.weight", *more.get("also", ())]
    wanted = {name: frozenset(kinds) for name in names}
    with open_checkpoint(path) as checkpoint:
        request = Request(
            checkpoint, wanted, wanted, Inputs("images", {"images": IMAGES}, "", ""),
            held_out=frozenset({4, 9}), module=f"{source}:{factory}",
        )  # fmt: skip
        with StatisticsWriter(tmp_path / "s.safetensors", room=header_room(names, {})) as writer:
            assert collect_module(request, writer, silent) == []
            record = Record(checkpoint.sample_hash(), "module", writer.sites(), frozenset(kinds))
            writer.finish(record)
    return open_statistics(tmp_path / "s.safetensors")


def test_statistics_are_those_of_patches_and_features(
    tmp_path: Path, source: Path, weights: dict[str, np.ndarray]
) -> None:
    found = collected(tmp_path, source, weights)
    apart = np.isin(np.arange(10), (4, 9))
    x = prepared(IMAGES)
    patches = functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2)  # [n, places, 4 * 9]
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        conv = found.of(checkpoint.info("conv.weight"))
        for group in range(2):
            rows = patches[..., group * 18 : group * 18 + 18]
            for values, chosen in ((conv.second_moment(), ~apart), (conv.held_out(), apart)):
                r = rows[torch.from_numpy(chosen)].reshape(-1, 18).double().numpy()
                np.testing.assert_allclose(values[group], r.T @ r / len(r), rtol=1e-5)
        assert conv.count == 8 * 9
        a, b = (found.of(checkpoint.info(name)) for name in ("a.weight", "b.weight"))
        assert a.site == b.site, "they read the same input"
        pooled = forward(weights, x)[0].numpy()[~apart]
        np.testing.assert_allclose(a.mean()[0], pooled.mean(0), rtol=1e-5)
    found.close()


def test_the_fisher_diagonal_is_that_of_labels_drawn_from_the_model(
    tmp_path: Path, source: Path, weights: dict[str, np.ndarray]
) -> None:
    with (
        collected(tmp_path, source, weights) as found,
        open_checkpoint(tmp_path / "m.safetensors") as checkpoint,
    ):
        own = found.of(checkpoint.info("a.weight")).output_fisher()
        conv = found.of(checkpoint.info("conv.weight")).output_fisher()
    # d log p(y) / d logits = onehot(y) - p, with the labels of the same generator.
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(5)
    for image in IMAGES:
        p = forward(weights, prepared(image[None]))[1].softmax(-1)
        y = torch.multinomial(p, 1, generator=generator)
        total += (functional.one_hot(y[:, 0], 5) - p)[0].square()
    np.testing.assert_allclose(own, (total / 10).numpy(), rtol=1e-4)
    assert conv.shape == (6,) and (conv > 0).any()


def test_a_module_that_writes_over_a_layers_input_is_refused(
    tmp_path: Path, source: Path, weights: dict[str, np.ndarray]
) -> None:
    with pytest.raises(UsageError, match=r"conv\.weight: the module writes over"):
        collected(tmp_path, source, weights, "Overwriting", (SECOND_MOMENT,))


def test_a_tensor_that_is_no_layer_of_the_module_is_refused(
    tmp_path: Path, source: Path, weights: dict[str, np.ndarray]
) -> None:
    more = weights | {"extra.weight": np.ones((3, 3), np.float32)}
    with pytest.raises(UsageError, match=r"extra\.weight: calibration does not reach"):
        collected(tmp_path, source, more, kinds=(MEAN,), also=["extra.weight"])
