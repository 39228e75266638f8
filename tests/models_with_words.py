"""Tiny transformers models of random weights whose tokenizers know words w0, w1, ..."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from toolbox import tiny_llama


def add_words(folder: Path, size: int, *, bos: bool = False, ends: bool = False) -> Path:
    """A tokenizer of `size` words; with a BOS (<s>, 0), or [CLS] (0) ... [SEP] (1) around."""
    import tokenizers

    names = [f"w{i}" for i in range(size)]
    names[2] = "<unk>"
    if bos:
        names[0] = "<s>"
    if ends:
        names[:2] = ["[CLS]", "[SEP]"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    if bos:
        config["bos_token"] = "<s>"
    if ends:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
        )
        config |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def talking_llama(folder: Path, *, layers: int = 3, bos: bool = True) -> Path:
    """A decoder of 64 channels and 96 words."""
    return add_words(tiny_llama(folder, layers=layers), 96, bos=bos)


def reading_bert(folder: Path) -> Path:
    """An encoder of 32 channels, two layers, 60 words, with a pooler."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return add_words(folder, 60, ends=True)


def words(count: int, vocabulary: int, seed: int = 0) -> str:
    """A line of random words (none of the special ones)."""
    numbers = np.random.default_rng(seed).integers(3, vocabulary, count)
    return " ".join(f"w{i}" for i in numbers)
