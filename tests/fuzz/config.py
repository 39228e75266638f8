"""`config.json`: sizes of what is taken are bounded, and keys that name code can be taken out.

The first byte says whether a quantized model is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from compress.checkpoint.config import check_config, code_keys, parse_config, strip_code_keys
from compress.checkpoint.files import InputFile
from compress.errors import InputError
from fuzz.checks import MemoryFile, outcome, require

NAME = "config.json"
WORDS = (
    b'"hidden_size":', b'"vocab_size":', b'"n_layer":', b'"num_attention_heads":', b'"head_dim":',
    b'"max_position_embeddings":', b'"sliding_window":', b'"auto_map":',
    b'"trust_remote_code":true', b'"_attn_implementation":"a/b"',
    b'"_attn_implementation_internal":', b'"custom_pipelines":', b'"quantization_config":{',
    b'"text_config":{', b"null", b"[1,2]", b"10000001", b"1e999", b"-1", b"1e3", b"\\ud800", b"NaN",
    b"true",
)  # fmt: skip
_BOUNDED = {"hidden_size", "d_model", "n_embd", "num_hidden_layers", "n_layer", "vocab_size"}
_file = MemoryFile()


def seeds(corpus: Path | None) -> Iterator[bytes]:
    """A good one, and those of the corpus."""
    yield (
        b'\x00{"model_type":"llama","hidden_size":8,"num_attention_heads":[2,2],"vocab_size":32,'
        b'"max_position_embeddings":-1,"text_config":{"n_layer":2,"auto_map":{"A":"b.C"}}}'
    )
    yield b'\x01{"quantization_config":{"bits":4},"_attn_implementation":"x/y","x":[{"d_ff":3}]}'
    for path in sorted(corpus.glob("cfg/*.json")) if corpus else ():
        if path.stat().st_size < 2000:
            yield b"\x00" + path.read_bytes()


def target(data: bytes) -> None:
    """Read one config, and write it without the keys that name code."""
    quantized = bool(data[0] & 1) if data else False
    file = InputFile(_file.fill(data[1:]), NAME)
    try:
        found = outcome(
            lambda: parse_config(file, allow_quantized=quantized),
            names=NAME, errors=(InputError,),
        )  # fmt: skip
    finally:
        file.close()
    if found is None:
        return
    config, _ = found
    for key in _BOUNDED & config.keys():
        value = config[key]
        require(value is None or (type(value) is int and 0 < value <= 10**7), "a size out of range")
    clean = strip_code_keys(config)
    require(code_keys(clean) == [], "keys that name code are left")
    require(code_keys(config) or clean == config, "something else was dropped")
    check_config(json.loads(json.dumps(clean)), NAME, allow_quantized=quantized)
