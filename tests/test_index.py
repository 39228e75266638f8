"""Directories: which files are the checkpoint, shards and their index, links, config, sidecars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_safetensors

from compress.checkpoint import check_config, code_keys, open_checkpoint, strip_code_keys
from compress.errors import InputError, UsageError
from compress.tensor import Role

ONE = b"\0\0\x80\x3f"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_sharded(folder: Path, **metadata: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / FIRST, {"a.weight": ("F32", [1], ONE)}, {"format": "pt"})
    write_safetensors(folder / SECOND, {"b.weight": ("F32", [1], ONE)}, {"extra": "1"})
    index = {"metadata": metadata, "weight_map": {"b.weight": SECOND, "a.weight": FIRST}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_in_order_with_merged_metadata(tmp_path: Path) -> None:
    with open_checkpoint(write_sharded(tmp_path, total_size=8)) as checkpoint:
        assert [(i.name, i.file) for i in checkpoint.infos()] == [
            ("a.weight", FIRST),
            ("b.weight", SECOND),
        ]
        assert checkpoint.metadata == {"format": "pt", "extra": "1"}
        assert checkpoint.directory == tmp_path.resolve()
        assert checkpoint.warnings == []
        assert checkpoint.read(checkpoint.info("b.weight")).tolist() == [1.0]


def test_the_index_itself_can_be_named(tmp_path: Path) -> None:
    index = write_sharded(tmp_path) / "model.safetensors.index.json"
    with open_checkpoint(index) as checkpoint:
        assert len(checkpoint.infos()) == 2


@pytest.mark.parametrize("total", [9, 1.5e9])
def test_a_wrong_total_size_is_a_warning(tmp_path: Path, total: float) -> None:
    with open_checkpoint(write_sharded(tmp_path, total_size=total)) as checkpoint:
        assert len(checkpoint.warnings) == 1 and "total_size" in checkpoint.warnings[0]


def test_an_unlisted_shard_is_refused_and_another_file_mentioned(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_safetensors(tmp_path / "consolidated.safetensors", {"x": ("F32", [1], ONE)})
    with open_checkpoint(tmp_path) as checkpoint:
        assert "consolidated.safetensors" in checkpoint.warnings[0]
    write_safetensors(tmp_path / "model-00003-of-00003.safetensors", {"x": ("F32", [1], ONE)})
    with pytest.raises(InputError, match="not listed"):
        open_checkpoint(tmp_path)


def test_a_whole_model_beside_an_index_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"x": ("F32", [1], ONE)})
    with pytest.raises(InputError, match="which one is the model"):
        open_checkpoint(tmp_path)
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert checkpoint.directory is None and checkpoint.config is None


def test_a_directory_with_unrelated_files_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        write_safetensors(tmp_path / name, {"x": ("F32", [1], ONE)})
    with pytest.raises(InputError, match=r"x\.safetensors, y\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "y.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")  # safetensors wins
    with open_checkpoint(tmp_path) as checkpoint:
        assert [i.file for i in checkpoint.infos()] == ["x.safetensors"]


def test_hub_cache_links_are_followed_and_others_are_not(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--m" / "snapshots" / "rev"
    blobs = tmp_path / "models--o--m" / "blobs"
    for folder in (snapshot / "1_Pooling", blobs):
        folder.mkdir(parents=True)
    write_safetensors(blobs / "aa", {"w": ("F32", [1], ONE)})
    (blobs / "bb").write_text('{"model_type": "bert"}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/aa")
    (snapshot / "config.json").symlink_to("../../blobs/bb")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/bb")
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.config == {"model_type": "bert"}
        assert checkpoint.sidecars == ["1_Pooling/config.json"]
    # The same link, but into another repository's blobs.
    other = tmp_path / "models--o--other" / "blobs"
    other.mkdir(parents=True)
    write_safetensors(other / "aa", {"w": ("F32", [1], ONE)})
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "aa")
    with pytest.raises(InputError, match="leads out"):
        open_checkpoint(snapshot)


def test_a_file_named_on_the_command_line_may_be_a_link(tmp_path: Path) -> None:
    real = write_safetensors(tmp_path / "real", {"w": ("F32", [1], ONE)})
    link = tmp_path / "link.safetensors"
    link.symlink_to(real)
    with open_checkpoint(link) as checkpoint:
        assert len(checkpoint.infos()) == 1


def test_sidecars_are_what_belongs_to_the_model(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    model = tmp_path / "model"
    write_sharded(model)
    for name in (
        "config.json", "tokenizer.json", "generation_config.json", "modeling_x.py", "README.md",
        "1_Pooling/config.json", "pytorch_model.bin", "x.gguf", "onnx/model.onnx",
        "onnx/model.onnx_data", "tf_model.h5", "flax_model.msgpack", ".gitattributes",
        ".cache/huggingface/x", "2_Dense/model.safetensors", "2_Dense/config.json",
        "optimizer.pt", "old.bin.index.json", "extra/other.safetensors",
    ):  # fmt: skip
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("{}")
    (model / "link.json").symlink_to(outside)
    (model / "modules.json").write_text('[{"path": "1_Pooling"}, {"path": "2_Dense"}]')
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.sidecars == [
            "README.md", "generation_config.json", "modeling_x.py", "modules.json",
            "tokenizer.json", "1_Pooling/config.json", "2_Dense/config.json",
            "2_Dense/model.safetensors",
        ]  # fmt: skip
        assert checkpoint.code_files == ["modeling_x.py"]
        assert any("link.json" in warning for warning in checkpoint.warnings)


def test_what_is_left_behind_is_named(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    model = tmp_path / "model"
    write_sharded(model)
    (model / "1_Pooling").symlink_to(elsewhere, target_is_directory=True)
    (model / "loop").symlink_to(model, target_is_directory=True)
    (model / ".hidden").symlink_to(elsewhere, target_is_directory=True)
    (model / "sub").mkdir()
    for name in ("vocab.bin", "sub/table.pt", "training_args.bin", "old.bin.index.json"):
        (model / name).write_text("{}")
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.sidecars == []
        warnings = checkpoint.warnings
    assert len(warnings) == 3, warnings
    assert any("1_Pooling" in w and "link" in w for w in warnings)
    assert any("loop" in w for w in warnings)
    assert any("vocab.bin" in w and "sub/table.pt" in w for w in warnings)


def test_a_weight_file_beside_the_checkpoint_is_named_once(tmp_path: Path) -> None:
    for name in ("model.safetensors", "other.safetensors"):
        write_safetensors(tmp_path / name, {"w": ("F32", [1], ONE)})
    with open_checkpoint(tmp_path) as checkpoint:
        assert sum("other.safetensors" in w for w in checkpoint.warnings) == 1


def test_metadata_of_others_is_told_from_aliases(tmp_path: Path) -> None:
    notes = {"format": "tf", "title": "t", "tied": "w"}
    path = write_safetensors(tmp_path / "model.safetensors", {"w": ("F32", [1], ONE)}, notes)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.aliases == {"tied": "w"}
        assert checkpoint.foreign_metadata == {"format": "tf", "title": "t"}
    path.unlink()
    write_safetensors(path, {"w": ("F32", [1], ONE)}, notes | {"compress": "{}"})
    with pytest.raises(InputError, match="already compressed"):
        open_checkpoint(path)
    with open_checkpoint(path, allow_quantized=True) as checkpoint:
        assert "compress" not in checkpoint.foreign_metadata


def test_config_is_kept_and_gives_roles(tmp_path: Path) -> None:
    text = '{"vocab_size": 8, "hidden_size": 4, "auto_map": {"AutoModel": "evil.Model"}}'
    (tmp_path / "config.json").write_text(text)
    data = bytes(8 * 4 * 4)
    write_safetensors(tmp_path / "model.safetensors", {"head.weight": ("F32", [8, 4], data)})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config_bytes == text.encode()
        assert checkpoint.code_files == ["config.json:auto_map"]
        assert checkpoint.info("head.weight").role is Role.HEAD
        before = checkpoint.fingerprint()
    (tmp_path / "config.json").write_text(text.replace("4", "2"))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.fingerprint() != before


def test_a_quantized_model_is_refused_unless_allowed(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", {"w": ("F32", [1], ONE)})
    with pytest.raises(InputError, match="already quantized"):
        open_checkpoint(tmp_path)
    with open_checkpoint(tmp_path, allow_quantized=True) as checkpoint:
        assert checkpoint.config == config


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("hidden_size", [1, 10**7, None], [0, -1, "8", 1.5, True, [8], 10**7 + 1]),
        ("num_attention_heads", [4, [1, 2], 0], ["4", [1, "2"], -1, {}]),
        ("max_position_embeddings", [10_485_760, -1], ["x", 10**12]),
    ],
)
def test_sizes_of_the_config_are_bounded(key: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check_config({"text_config": {key: value}}, "config.json")
    for value in bad:
        with pytest.raises(InputError, match=key):
            check_config({"text_config": {key: value}}, "config.json")


def test_keys_that_name_code_are_found_and_stripped_at_every_level() -> None:
    config = {
        "auto_map": {"AutoConfig": "x.Y"},
        "hidden_size": 8,
        "_attn_implementation": "evil/kernel",
        "text_config": {"trust_remote_code": True, "layers": [{"custom_pipelines": {}}, 3]},
        "vision_config": {"_attn_implementation": "sdpa"},
    }
    assert code_keys(config) == [
        "_attn_implementation",
        "auto_map",
        "text_config.layers.0.custom_pipelines",
        "text_config.trust_remote_code",
    ]
    clean = strip_code_keys(config)
    assert clean == {
        "hidden_size": 8,
        "text_config": {"layers": [{}, 3]},
        "vision_config": {"_attn_implementation": "sdpa"},
    }
    assert code_keys(clean) == [] and "auto_map" in config


def test_models_that_come_with_the_project(shared_dir: Path) -> None:
    with open_checkpoint(shared_dir / "models" / "tiny-llama-en") as checkpoint:
        roles = [info.role for info in checkpoint.infos()]
        assert roles.count(Role.LINEAR) == 6 * 7
        assert roles.count(Role.HEAD) == roles.count(Role.EMBEDDING) == 1
        assert Role.UNCLEAR not in roles
        assert "tokenizer.json" in checkpoint.sidecars
        assert "config.json" not in checkpoint.sidecars


def test_an_index_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tf_model.h5.index.json").write_text('{"weight_map": {"a": "b.h5"}}')
    with pytest.raises(InputError):
        open_checkpoint(tmp_path / "tf_model.h5.index.json")
    with pytest.raises(UsageError):
        open_checkpoint(tmp_path / "missing.safetensors.index.json")
