"""Running a compressed checkpoint: torch modules and a loader on the kernels."""

from compress.runtime.loading import load
from compress.runtime.modules import CompressedEmbedding, CompressedLinear

__all__ = ["CompressedEmbedding", "CompressedLinear", "load"]
