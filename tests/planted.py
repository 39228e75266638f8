"""Small random transformers with super weights at known places, that do make massive activations.

A neuron of an early block's MLP is turned to the input that one token brings there, so that it
fires on that token alone, and weights of its column in the down projection carry it into the
residual stream. Weights larger than those, in columns of neurons that never fire, lead a search by
magnitude astray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, WIDTH, LAYERS, VOCABULARY = 64, 128, 7, 96
BERT_HIDDEN = 256  # a norm that takes off the mean keeps ratios below the number of channels
FIRST, DELIMITER = 0, 5  # tokens that massive activations sit on
FIRED = {"llama": 10.0}  # what a planted neuron's gate is on its token; squared behind it
PLAIN_FIRED = 60.0  # without a gate
DISTRACTOR = 9.0  # larger than every planted weight

Place = tuple[int, int, int]  # layer, row, column of the down projection
NAMES = {
    "llama": "model.layers.{}.mlp.down_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "bert": "bert.encoder.layer.{}.output.dense",
}
_FIRST_MATRICES = {
    "llama": ("mlp.gate_proj", "mlp.up_proj"),
    "opt": ("fc1",),
    "gpt2": ("mlp.c_fc",),
    "neox": ("mlp.dense_h_to_4h",),
    "bert": ("intermediate.dense",),
}


@dataclass(frozen=True)
class Neuron:
    """A planted neuron: the token it fires on, and its weights by row of the down projection."""

    layer: int
    column: int
    rows: Mapping[int, float]
    token: int = FIRST


def shared_column(seed: int) -> list[Neuron]:
    """One neuron that writes into three rows."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(HIDDEN, 3, replace=False).tolist()
    values = rng.uniform(3, 6, 3) * rng.choice([-1, 1], 3)
    column = int(rng.integers(WIDTH))
    return [Neuron(int(rng.integers(1, 3)), column, dict(zip(rows, values.tolist(), strict=True)))]


def shared_row(seed: int) -> list[Neuron]:
    """Three neurons that write into one row."""
    rng = np.random.default_rng(seed)
    columns = rng.choice(WIDTH, 3, replace=False).tolist()
    sign = float(rng.choice([-1, 1]))
    row, layer = int(rng.integers(HIDDEN)), int(rng.integers(1, 3))
    return [Neuron(layer, c, {row: sign * float(rng.uniform(3, 6))}) for c in columns]


def places(neurons: Sequence[Neuron]) -> set[Place]:
    """Where the planted weights are."""
    return {(n.layer, row, n.column) for n in neurons for row in n.rows}


def token_ids(seed: int = 0, samples: int = 4, length: int = 24) -> np.ndarray:
    """int32 [samples, length]; each begins with FIRST, and holds DELIMITER once."""
    ids = np.random.default_rng(seed).integers(DELIMITER + 1, VOCABULARY, (samples, length))
    ids[:, 0], ids[:, length // 2] = FIRST, DELIMITER
    return ids.astype(np.int32)


def make_model(kind: str, seed: int, neurons: Sequence[Neuron] = ()) -> Any:
    """A transformers model, eval mode, with neurons planted and distractors in their layers."""
    import torch

    torch.manual_seed(seed)
    model = _random(kind).eval()
    model.get_input_embeddings().weight.data.normal_()
    ids = torch.from_numpy(token_ids()).long()
    rng = np.random.default_rng(seed + 1)
    taken = {n.column for n in neurons}
    for layer in sorted({n.layer for n in neurons} or {1}):
        down = _matrix(model.get_submodule(NAMES[kind].format(layer)))
        for column in [c for c in rng.permutation(WIDTH).tolist() if c not in taken][:4]:
            down[int(rng.integers(HIDDEN)), column] = DISTRACTOR
        for neuron in (n for n in neurons if n.layer == layer):
            _turn(model, kind, neuron, ids)
            for row, value in neuron.rows.items():
                down[row, neuron.column] = value
    return model


def save(folder: Path, kind: str, seed: int, neurons: Sequence[Neuron] = ()) -> Path:
    """The model as a checkpoint in `folder`, and the folder."""
    make_model(kind, seed, neurons).save_pretrained(folder)
    return folder


def write_statistics(path: Path, model: Path, ids: np.ndarray) -> Path:
    """A statistics file of the model that holds nothing but inputs, and its path."""
    from safetensors.numpy import save_file

    from compress.calibrate.statistics import INPUTS, KEY, Record
    from compress.checkpoint import open_checkpoint

    with open_checkpoint(model) as checkpoint:
        record = Record(checkpoint.sample_hash(), "hf", (), frozenset({INPUTS}))
    save_file({"inputs/input_ids": ids}, path, metadata={KEY: record.to_json()})
    return path


def _turn(model: Any, kind: str, neuron: Neuron, ids: Any) -> None:
    """Make a neuron fire FIRED on its token, and hardly on others."""
    import torch

    block = model.get_submodule(NAMES[kind].format(neuron.layer).split(f".{neuron.layer}.")[0])
    firsts = [block[neuron.layer].get_submodule(name) for name in _FIRST_MATRICES[kind]]
    seen = []
    handle = firsts[0].register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    inputs = seen[0].flatten(0, -2).double()
    own = inputs[ids.flatten() == neuron.token].mean(0)
    others = inputs[ids.flatten() != neuron.token]
    # The direction that tells the token from the others: least squares, a little regularised.
    moment = others.T @ others / len(others) + 1e-3 * own.square().mean() * torch.eye(len(own))
    direction = torch.linalg.solve(moment, own)
    direction *= FIRED.get(kind, PLAIN_FIRED) / (direction @ own)
    for first in firsts:
        _matrix(first)[neuron.column] = direction.float()


def _matrix(module: Any) -> Any:
    """The weight as [out, in]; GPT-2's is stored transposed."""
    weight = module.weight.data
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _random(kind: str) -> Any:
    import transformers as t

    same = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "bos_token_id": FIRST,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "max_position_embeddings": 64,
        # Blocks that add values of order one; behind a block's norm they would wash all else away.
        "initializer_range": 0.01 if kind == "bert" else 0.15,
    }
    if kind == "llama":
        return t.LlamaForCausalLM(
            t.LlamaConfig(**same, intermediate_size=WIDTH, num_key_value_heads=4)
        )
    if kind == "opt":
        return t.OPTForCausalLM(t.OPTConfig(**same, ffn_dim=WIDTH, word_embed_proj_dim=HIDDEN))
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(**same, n_inner=WIDTH))
    if kind == "neox":
        return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**same, intermediate_size=WIDTH))
    same["hidden_size"] = BERT_HIDDEN
    return t.BertForMaskedLM(t.BertConfig(**same, intermediate_size=WIDTH))
