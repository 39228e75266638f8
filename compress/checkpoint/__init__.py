"""Reading checkpoints: everything that opens a file which someone else wrote."""

from compress.checkpoint.config import check_config, code_keys, read_config, strip_code_keys
from compress.checkpoint.source import Checkpoint, open_checkpoint

__all__ = [
    "Checkpoint",
    "check_config",
    "code_keys",
    "open_checkpoint",
    "read_config",
    "strip_code_keys",
]
