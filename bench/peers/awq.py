"""llm-compressor's AWQ: dequantized block linears and the norms that took the scales.

    python bench/peers/awq.py MODEL OUT --ids ids.npy --bits 4 --group 64 [--then gptq]

AWQ only rescales channels; what rounds them afterwards is named by --then: `round` is AWQ as
published, `gptq` a chain of both. This release's AWQ pins its cache for an accelerator and fails
where there is none; pinning is switched off then. Runs inside llm-compressor's environment
(environments.py).
"""

from __future__ import annotations

import one_shot
import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache


def main() -> None:
    parser = one_shot.parser(__doc__.splitlines()[0])
    parser.add_argument("--duo", choices=["true", "false", "both"], default="both")
    parser.add_argument("--grid", type=int, default=20, help="scales tried a mapping")
    parser.add_argument("--then", choices=["round", "gptq"], default="round")
    options = parser.parse_args()
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None
    duo = {"true": True, "false": False, "both": "both"}[options.duo]
    rounds = QuantizationModifier if options.then == "round" else GPTQModifier
    recipe = [
        AWQModifier(duo_scaling=duo, n_grid=options.grid),
        rounds(config_groups=one_shot.scheme(options), ignore=["lm_head"]),
    ]
    one_shot.run(options, recipe)


if __name__ == "__main__":
    main()
