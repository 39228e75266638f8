"""torch custom ops on packed matrices: `torch.ops.compress.linear`, `dense_linear`, `embedding`.

They are registered through `torch.library.Library`, whose calls cost half of what the decorator
`torch.library.custom_op` costs, and have fake implementations, so that torch.compile and
torch.export take them as one opaque node. They run on the CPU and know no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.kernels import dispatch, products
from compress.kernels.rows import decode_rows

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Packed bytes times rows of the batch that one thread multiplies in some 20 microseconds.
_WORTH_THREADS = 1 << 18
# torch's own products of 16-bit weights win at larger batches where it has instructions for them;
# with AVX2 alone ours were 1.3 times as fast at batch 1 and 6 times at batch 128.
_DENSE_BATCH = 1 << 62 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT") else 8
_OTHER_DEVICES = ("CUDA", "MPS", "XPU")

# The ops live as long as it does. (torch's own stubs leave Library untyped.)
library: Any = torch.library.Library("compress", "DEF")  # type: ignore[no-untyped-call]


def numpy_view(values: Tensor) -> Any:
    """A contiguous CPU tensor as the numpy array that shares its memory; bfloat16 too."""
    if values.dtype != torch.bfloat16:
        return values.numpy()
    import ml_dtypes

    return values.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _bytes(values: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, for the compiled module, which checks sizes."""
    return values.view(torch.uint8).numpy().reshape(-1)


def _linear(x: Tensor, packed: Tensor, out_features: int, precision: str) -> Tensor:
    """x [..., in_features] times a packed matrix: [..., out_features] in x's dtype."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    native = dispatch.current().native
    kind = KINDS.get(x.dtype)
    if native is None or kind is None or precision not in products.PRECISIONS:
        _checked_linear(x, packed, y, precision)
        return y
    if y.numel():
        batch = y.numel() // out_features
        # The module checks every size against the buffer's own words.
        native.linear(
            packed.numpy(),
            _bytes(x),
            kind,
            batch,
            _bytes(y),
            kind,
            precision == "exact",
            _threads(packed.numel() * batch),
        )
    return y


def _threads(work: int) -> int:
    """torch's number of threads, or one where waking the others would take longer."""
    return torch.get_num_threads() if work >= _WORTH_THREADS else 1


def _checked_linear(x: Tensor, packed: Tensor, y: Tensor, precision: str) -> None:
    """The same through the wrapper that names what is wrong, or the numpy reference."""
    if x.dtype not in KINDS:
        raise TypeError(f"x must be float32, float16 or bfloat16, not {x.dtype}")
    batch = math.prod(x.shape[:-1])
    products.linear(
        numpy_view(x.reshape(batch, x.shape[-1])),
        packed.numpy(),
        numpy_view(y.view(batch, y.shape[-1])),
        precision=precision,
        threads=torch.get_num_threads(),
    )


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in_features] times a plain weight [out_features, in_features] of 16 bits, + bias.

    A bias is added in float32, so that the result is rounded to x's dtype once.
    """
    x, weight = x.contiguous(), weight.contiguous()
    batch = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if not batch or batch > _DENSE_BATCH or x.dtype not in KINDS or weight.dtype not in KINDS:
        own = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, weight.to(x.dtype), own)
    dtype = x.dtype if bias is None else torch.float32
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    _multiply_dense(x, weight, y, batch)
    return y if bias is None else y.add_(bias).to(x.dtype)


def _multiply_dense(x: Tensor, weight: Tensor, y: Tensor, batch: int) -> None:
    """Fill y by the kernel, or by the numpy reference."""
    threads = _threads(weight.nbytes * batch)
    native = dispatch.current().native
    if native is None:
        products.dense_linear(
            numpy_view(x.view(batch, x.shape[-1])),
            numpy_view(weight),
            numpy_view(y.view(batch, weight.shape[0])),
            threads=threads,
        )
        return
    native.dense_linear(
        _bytes(weight),
        KINDS[weight.dtype],
        weight.shape[0],
        weight.shape[1],
        _bytes(x),
        KINDS[x.dtype],
        batch,
        _bytes(y),
        KINDS[y.dtype],
        threads,
    )


def _embedding(indices: Tensor, packed: Tensor, embedding_dim: int, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table: [..., embedding_dim] in `dtype`."""
    flat = indices.reshape(-1).to(torch.int64).numpy()
    rows = torch.from_numpy(decode_rows(packed.numpy(), flat))
    return rows.to(dtype).view(*indices.shape, embedding_dim)


def _refuse(*arguments: Any) -> Tensor:
    where = next(a.device for a in arguments if isinstance(a, Tensor) and not a.is_cpu)
    raise ValueError(f"an argument is on the device {where}: these products run on the CPU")


def _fake_linear(x: Tensor, packed: Tensor, out_features: int, precision: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_embedding(
    indices: Tensor, packed: Tensor, embedding_dim: int, dtype: torch.dtype
) -> Tensor:
    return indices.new_empty((*indices.shape, embedding_dim), dtype=dtype)


def _define(name: str, schema: str, run: Any, fake: Any) -> Any:
    tags: Sequence[torch.Tag] = (torch.Tag.pt2_compliant_tag,)
    library.define(name + schema, tags=tags)
    library.impl(name, run, "CPU")
    for device in _OTHER_DEVICES:
        library.impl(name, _refuse, device)
    torch.library.register_fake(f"compress::{name}", fake, lib=library)
    return getattr(torch.ops.compress, name).default


linear = _define(
    "linear",
    "(Tensor x, Tensor packed, int out_features, str precision) -> Tensor",
    _linear,
    _fake_linear,
)
embedding = _define(
    "embedding",
    "(Tensor indices, Tensor packed, int embedding_dim, ScalarType dtype) -> Tensor",
    _embedding,
    _fake_embedding,
)
dense_linear = _define(
    "dense_linear",
    "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    _dense_linear,
    _fake_dense_linear,
)
