"""Modules that run on the kernels: weights stay packed, or plain 16-bit weights lie where they are.

`CompressedLinear` and `CompressedEmbedding` hold a packed buffer, `DenseLinear` another module's
weight. They are for inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.kernels import products
from compress.runtime import ops

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class _Packed(nn.Module):
    """What both have in common: the buffer, and a `weight` of shape and dtype, without values."""

    packed: Tensor
    like: Tensor

    def __init__(self, packed: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        if packed.device.type != "cpu" or packed.dtype != torch.uint8:
            raise TypeError(f"packed must be uint8 on the CPU, not {packed.dtype} {packed.device}")
        self._shape = products.linear_shape(packed.numpy())
        self.register_buffer("packed", packed)
        # An empty buffer follows `model.to(dtype)` as other weights do.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """An empty stand-in on the meta device, for code that asks for shape or dtype only.

        Its dtype is the model's, since some models cast activations to it.
        """
        return torch.empty(self._shape, dtype=self.like.dtype, device="meta")


class CompressedLinear(_Packed):
    """y = x W^T + bias, where every term of W lies in one packed buffer.

    packed     uint8 [bytes], of `compress.kernels.packing.pack_linear`, bias included
    precision  "exact" (activations as 16-bit integers) or "fast" (8-bit); see
               compress/kernels/products.py
    dtype      what `weight.dtype` says; products take any of the three below

    `forward` takes float32, float16 or bfloat16 [..., in_features] and returns the same dtype. For
    inference only: x that requires a gradient is refused. Raises ValueError for a wrong precision
    or a buffer that is no packed matrix.
    """

    def __init__(
        self, packed: Tensor, precision: str = "exact", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(packed, dtype)
        products.check_options(precision, 1)
        self.out_features, self.in_features = self._shape
        self.precision = precision
        self._expected = (self.in_features,)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        if x.shape[-1:] != self._expected or not x.is_cpu or x.requires_grad:
            self._refuse(x)
        result: Tensor = ops.linear(x, self.packed, self.out_features, self.precision)
        return result

    def _refuse(self, x: Tensor) -> None:
        if not x.is_cpu:
            raise ValueError(f"x is on the device {x.device}: packed weights run on the CPU")
        if x.shape[-1:] != self._expected:
            raise ValueError(f"x must be [..., {self.in_features}], not {list(x.shape)}")
        if torch.is_grad_enabled():
            raise ValueError(
                "x requires a gradient, which packed weights do not give: use torch.no_grad()"
            )

    def extra_repr(self) -> str:
        """What printing the module shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" precision={self.precision!r}, bytes={self.packed.numel()}"
        )


class CompressedEmbedding(_Packed):
    """Rows of a packed table, decoded when they are asked for, in the dtype of `like`."""

    def __init__(self, packed: Tensor, dtype: torch.dtype) -> None:
        super().__init__(packed, dtype)
        self.num_embeddings, self.embedding_dim = self._shape

    def forward(self, indices: Tensor) -> Tensor:
        """Integers [...] -> [..., embedding_dim]. Raises IndexError for a row that is not there."""
        if not indices.is_cpu:
            raise ValueError(
                f"indices are on the device {indices.device}: packed weights run on the CPU"
            )
        result: Tensor = ops.embedding(indices, self.packed, self.embedding_dim, self.like.dtype)
        return result

    def extra_repr(self) -> str:
        """What printing the module shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bytes={self.packed.numel()}"


class DenseLinear(nn.Module):
    """y = x W^T + bias with a plain weight of 16 bits, which it shares with the module it replaces.

    torch multiplies such weights slowly where the processor has no instructions for them; a
    language-model head read once a token is most of what a small model does.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        if not x.is_cpu or x.requires_grad:
            return nn.functional.linear(x, self.weight, self.bias)
        result: Tensor = ops.dense_linear(x, self.weight, self.bias)
        return result

    def extra_repr(self) -> str:
        """What printing the module shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def use_dense_kernels(model: nn.Module) -> None:
    """Put a `DenseLinear` in the place of every Linear with a weight of 16 bits."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.dtype in _SIXTEEN_BITS:
                setattr(module, name, DenseLinear(child).eval())
