"""How the operators of an export are chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How an export is written.

    style           "nbits" (MatMulNBits) or "qdq" (blocked DequantizeLinear, [in, out])
    accuracy_level  of MatMulNBits: 0 exact, 4 with activations of 8 bits; None is 4 for 2 and 8
                    bits, whose exact path is a hundred times as slow, and 0 for 4 bits
    self_contained  every weight goes to `model.onnx.data`: the two files need no other
    """

    style: str = "nbits"
    accuracy_level: int | None = None
    self_contained: bool = False

    def level(self, bits: int) -> int:
        """The accuracy level of a product with codes of so many bits."""
        if self.accuracy_level is not None:
            return self.accuracy_level
        return 0 if bits == 4 else 4
