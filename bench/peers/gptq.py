"""llm-compressor's GPTQ: dequantized block linears and honest figures.

    python bench/peers/gptq.py MODEL OUT --ids ids.npy --bits 4 --group 64 [--actorder static]

Runs inside llm-compressor's environment (environments.py).
"""

from __future__ import annotations

import one_shot
from llmcompressor.modifiers.gptq import GPTQModifier


def main() -> None:
    parser = one_shot.parser(__doc__.splitlines()[0])
    parser.add_argument("--actorder", choices=["static", "none"], default="static")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--block", type=int, default=128)
    options = parser.parse_args()
    modifier = GPTQModifier(
        config_groups=one_shot.scheme(options),
        ignore=["lm_head"],
        actorder=None if options.actorder == "none" else options.actorder,
        dampening_frac=options.damping,
        block_size=options.block,
    )
    one_shot.run(options, [modifier])


if __name__ == "__main__":
    main()
