"""Names that checkpoints were stored under before transformers called the modules otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def renaming_of(model: Any) -> Callable[[str], str]:
    """What transformers itself renames a stored tensor of this model to when it loads it.

    Only renames: tensors that it would split, join or transpose keep their names. An older
    transformers has no such table, and nothing is renamed.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return lambda name: name
    found = get_model_conversion_mapping(model)
    renames = [one for one in found if isinstance(one, WeightRenaming)]
    if not renames:
        return lambda name: name
    return lambda name: str(rename_source_key(name, renames, [])[0])
