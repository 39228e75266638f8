"""Architectures captured as skeletons: what onnxruntime computes is what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_skeletons import MAKERS

from compress.checkpoint import skeleton
from compress.errors import InputError, UsageError
from compress.output import open_any

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

from compress.export_onnx.capture import capture  # noqa: E402
from compress.export_onnx.named_weights import NamedWeights  # noqa: E402
from compress.export_onnx.rewriting import to_skeleton  # noqa: E402
from compress.export_onnx.tasks import Input  # noqa: E402
from compress.runtime.architecture import build  # noqa: E402
from compress.runtime.loading import WeightLoader  # noqa: E402

_TEXT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip


def _close(found: Any, expected: Any) -> None:
    wanted = expected.numpy() if hasattr(expected, "numpy") else expected
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_a_decoder_with_its_cache_gives_the_logits_of_a_full_pass(tried: Any, which: str) -> None:
    model = tried(which)
    ids = np.random.default_rng(0).integers(3, 50, (2, 8))
    mask = np.ones((2, 8), np.int64)
    mask[1, :3] = 0  # padded on the left
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    real = mask.astype(bool)
    every = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    expected = model.expected(**every).logits.numpy()[real]

    whole = model.run(**every, **model.empty_cache(2))
    _close(whole["logits"][real], expected)

    found, cache = [], model.empty_cache(2)
    for start, stop in ((0, 5), (5, 6), (6, 8)):  # a prompt, one token, two more
        step = model.run(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop], **cache,
        )  # fmt: skip
        found.append(step["logits"])
        cache = {
            name.replace("present", "past_key_values"): value
            for name, value in step.items()
            if name.startswith("present")
        }
    _close(np.concatenate(found, 1)[real], expected)

    alone = model.run(
        input_ids=ids[:1, :1], attention_mask=mask[:1, :1], position_ids=positions[:1, :1],
        **model.empty_cache(1),
    )  # fmt: skip
    _close(alone["logits"], model.expected(input_ids=ids[:1, :1]).logits)


def test_a_text_classifier_gives_transformers_logits(tried: Any) -> None:
    model = tried("bert")
    ids = np.random.default_rng(1).integers(3, 50, (3, 7))
    mask = np.ones((3, 7), np.int64)
    mask[1, 4:] = 0
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    assert model.captured.task == "classifier" and model.captured.outputs == ("logits",)
    _close(model.run(**arrays)["logits"], model.expected(**arrays).logits)
    assert {one.name for one in model.captured.inputs} == arrays.keys()


def test_an_image_classifier_gives_transformers_logits(tried: Any) -> None:
    model = tried("resnet")
    pixels = np.random.default_rng(2).standard_normal((2, 3, 224, 224)).astype(np.float32)
    assert [one.axes for one in model.captured.inputs] == [("batch", 3, 224, 224)]
    _close(model.run(pixel_values=pixels)["logits"], model.expected(pixel_values=pixels).logits)


@pytest.mark.parametrize("which", ["llama", "gpt2", "bert", "resnet"])
def test_every_stored_tensor_is_a_weight_and_little_else_is_in_the_graph(
    tried: Any, which: str
) -> None:
    model = tried(which)
    weights = skeleton.weights_of(model.captured.model)
    with open_any(model.path) as checkpoint:
        stored = {info.name: info.shape for info in checkpoint.infos() if info.is_float}
    assert {name: tuple(t.dims) for name, t in weights.items()} == stored
    inline = [t for t in model.captured.model.graph.initializer if not skeleton.is_weight(t)]
    assert sum(t.ByteSize() for t in inline) < 2000
    assert not any(node.metadata_props for node in model.captured.model.graph.node)
    assert str(Path(torch.__file__).parent).encode() not in model.captured.model.SerializeToString()


def test_products_are_nodes_of_our_domain(tried: Any) -> None:
    """One for each Linear; Conv1D's says that its weight is stored transposed."""
    found = {}
    for which in ("llama", "gpt2", "bert", "resnet"):
        nodes = tried(which).captured.model.graph.node
        found[which] = {
            node.input[1]: any(a.name == "transposed" and a.i == 1 for a in node.attribute)
            for node in nodes
            if node.domain == skeleton.DOMAIN
        }
    assert len(found["llama"]) == 2 * 7 + 1 and not any(found["llama"].values())
    assert "model.embed_tokens.weight" in found["llama"]  # the tied head
    assert found["gpt2"] == {
        "transformer.h.0.attn.c_attn.weight": True,
        "transformer.h.0.attn.c_proj.weight": True,
        "transformer.h.0.mlp.c_fc.weight": True,
        "transformer.h.0.mlp.c_proj.weight": True,
        "transformer.wte.weight": False,
    }
    assert len(found["bert"]) == 6 + 2
    assert list(found["resnet"]) == ["classifier.1.weight"]


def test_axes_have_names(tried: Any) -> None:
    model = tried("gpt2")
    graph = model.captured.model.graph
    shapes = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "total"),
        "position_ids": ("batch", "sequence"),
        "past_key_values.0.key": ("batch", 4, "past", 4),
        "past_key_values.0.value": ("batch", 4, "past", 4),
        "logits": ("batch", "sequence", 50),
        "present.0.key": ("batch", 4, "total", 4),
        "present.0.value": ("batch", 4, "total", 4),
    }


def test_two_captures_are_the_same_bytes(tried: Any) -> None:
    model = tried("resnet")
    with open_any(model.path) as checkpoint:
        again = capture(checkpoint)
    assert again == model.captured
    assert again.model.SerializeToString() == model.captured.model.SerializeToString()


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    with (
        open_any(tmp_path) as checkpoint,
        pytest.raises(UsageError, match="T5ForConditionalGeneration is an encoder-decoder") as told,
    ):
        capture(checkpoint)
    assert "--module" in str(told.value.hint)


def test_a_weight_that_is_not_there_is_named(tmp_path: Path) -> None:
    MAKERS["llama"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        open_any(tmp_path) as checkpoint,
        pytest.raises(InputError, match=r"9 weights .* model\.layers\.2\."),
    ):
        capture(checkpoint)


def test_an_opset_that_is_not_written_is_refused(tmp_path: Path) -> None:
    MAKERS["llama"]().save_pretrained(tmp_path)
    with open_any(tmp_path) as checkpoint, pytest.raises(UsageError, match="opset 7"):
        capture(checkpoint, opset=7)


def test_an_untied_head_is_a_weight_of_its_own(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_TEXT, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with open_any(tmp_path) as checkpoint:
        model = build(checkpoint.config, torch.float32, "here")
        weights = NamedWeights(WeightLoader(checkpoint, model, None))
        assert weights.shapes.keys() == {info.name for info in checkpoint.infos()}
    with weights.in_place():
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight is None  # nothing is left of it


def test_images_are_as_large_as_the_config_says(tmp_path: Path) -> None:
    """Old names of a checkpoint (vit.encoder.layer) are found under the class's new ones."""
    from compress.export_onnx.tasks import inputs_of

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=16, patch_size=8, num_labels=2,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    with open_any(tmp_path) as checkpoint:
        model = build(checkpoint.config, torch.float32, "here")
        assert inputs_of(model, "classifier", checkpoint) == [
            Input("pixel_values", ("batch", 3, 16, 16), torch.float32)
        ]
        weights = NamedWeights(WeightLoader(checkpoint, model, None))
        assert weights.shapes.keys() == {info.name for info in checkpoint.infos()}


def test_a_tensor_called_as_an_output_is_refused_and_as_a_value_is_kept_apart() -> None:
    from onnx import TensorProto, helper

    def model(name: str) -> Any:
        nodes = [
            helper.make_node("Weight", [], ["w"], domain=skeleton.DOMAIN, name="n"),
            helper.make_node("Neg", ["w"], ["neg"]),
            helper.make_node("Add", ["x", "neg"], ["y"]),
        ]
        nodes[0].attribute.append(helper.make_attribute("name", name))
        value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("x", "y")]
        return helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:]))

    with pytest.raises(InputError, match="tensor y"):
        to_skeleton(model("y"), {"y": (2,)}, [], "encoder")
    made = model("neg")
    to_skeleton(made, {"neg": (2,)}, [], "encoder")
    assert [list(node.input) for node in made.graph.node] == [["neg"], ["x", "neg.value"]]
    assert skeleton.weights_of(made).keys() == {"neg"}
