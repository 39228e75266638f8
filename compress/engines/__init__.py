"""Ways to run a model whose weights come from a `Checkpoint`; all import torch or onnxruntime."""
