"""llm-compressor's SparseGPT, then GPTQ: a sparse and quantized model.

    python bench/peers/sparsegpt_gptq.py MODEL OUT --ids ids.npy --sparsity 0.5 --then gptq-masked

This release's GPTQ knows no mask: what it compensates brings pruned entries back to life. --then
says what is done about it:
  gptq         as released, pruned entries set to zero again in the end: their compensation is lost;
  gptq-masked  the same loop with pruned entries rounded to zero inside it, so that later columns
               absorb what they would have held: not released, the strongest peer of a joint sweep;
  round        symmetric rounding of what SparseGPT left, which keeps zeros.
Bits are counted as of a bitmask with the codes of nonzeros. Runs inside llm-compressor's
environment.
"""

from __future__ import annotations

from typing import Any

import one_shot
import torch
from llmcompressor.modifiers.gptq import GPTQModifier, gptq_quantize
from llmcompressor.modifiers.gptq import base as gptq_base
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier


class MaskedGptq:
    """Stands in for `quantize_weight`: zeros of the incoming weights stay zero.

    The released function is called as it is; what it rounds a column with is wrapped, and so is the
    permutation of act-order, which the mask must follow. With `inside` false the mask is applied
    to the result only.
    """

    def __init__(self, inside: bool) -> None:
        self.inside = inside
        self.mask = torch.empty(0)
        self.column = 0
        self.released = gptq_quantize.quantize_weight
        self.order = gptq_quantize.apply_activation_ordering
        self.round = gptq_quantize.fake_quantize

    def __call__(self, weights: torch.Tensor, *others: Any, **named: Any) -> Any:
        """`quantize_weight` for weights [batch, rows, columns]."""
        mask = self.mask = weights != 0
        self.column = 0
        quantized, *rest = self.released(weights, *others, **named)
        return (quantized * mask, *rest)

    def ordered(self, weights: torch.Tensor, hessians: torch.Tensor, order: Any) -> Any:
        """Act-order as released; the mask follows the permutation."""
        done = self.order(weights, hessians, order)
        if done[2] is not None:
            index = done[2].unsqueeze(-2).expand_as(self.mask)
            self.mask = torch.gather(self.mask, -1, index)
        return done

    def rounded(self, column: torch.Tensor, *others: Any) -> torch.Tensor:
        """`column` is [rows, batch] of the sweep's next column."""
        value = self.round(column, *others)
        kept = self.mask[:, :, self.column].transpose(0, 1)
        self.column += 1
        return value * kept

    def install(self) -> None:
        """Put the wrappers in the places that the modifier calls."""
        gptq_base.quantize_weight = self
        if self.inside:
            gptq_quantize.apply_activation_ordering = self.ordered
            gptq_quantize.fake_quantize = self.rounded


def main() -> None:
    parser = one_shot.parser(__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--then", choices=["gptq", "gptq-masked", "round"], default="gptq-masked")
    parser.add_argument("--actorder", choices=["static", "none"], default="static")
    options = parser.parse_args()
    if options.asymmetric:
        parser.error("--asymmetric: a zero weight has to stay zero")
    groups = one_shot.scheme(options)
    sparse = SparseGPTModifier(
        sparsity=options.sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]
    )
    if options.then == "round":
        second = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    else:
        MaskedGptq(inside=options.then == "gptq-masked").install()
        second = GPTQModifier(
            config_groups=groups,
            ignore=["lm_head"],
            actorder=None if options.actorder == "none" else options.actorder,
        )
    one_shot.run(options, [sparse, second], keep_zeros=True)


if __name__ == "__main__":
    main()
