"""The places of a model that stored tensors fill."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

_CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True)
class Slot:
    """A place in the model that a parameter fills."""

    name: str  # of the parameter
    parent: nn.Module | None  # of `module`; None for the model itself
    module: nn.Module
    child: str  # the name of `module` in its parent
    attribute: str

    @property
    def own(self) -> nn.Parameter:
        """The parameter that the model was built with."""
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]

    @property
    def kind(self) -> type[nn.Module] | None:
        """nn.Linear or nn.Embedding where a packed module can take the module's place.

        A subclass may use its weight in ways of its own, so only the very classes count. GPT-2's
        Conv1D is a Linear whose weight is stored transposed.
        """
        if self.attribute != "weight" or self.parent is None:
            return None
        if type(self.module) is nn.Embedding:
            return None if self.module.max_norm else nn.Embedding
        cls = type(self.module)
        is_conv1d = f"{cls.__module__}.{cls.__name__}" == _CONV1D
        return nn.Linear if cls is nn.Linear or is_conv1d else None

    def replace(self, module: nn.Module) -> None:
        """Put another module where this one was."""
        if self.parent is not None:
            self.parent._modules[self.child] = module.eval()


def find_slots(model: nn.Module) -> dict[str, list[Slot]]:
    """The places of each parameter, by each of its names; a tied one has several."""
    slots: dict[str, list[Slot]] = {}
    shared: dict[int, list[Slot]] = {}
    for name, module in model.named_modules():
        outer, _, child = name.rpartition(".")
        parent = model.get_submodule(outer) if name else None
        for attribute, param in module._parameters.items():
            if param is not None:
                full = _join(name, attribute)
                places = shared.setdefault(id(param), [])
                places.append(Slot(full, parent, module, child, attribute))
                slots[full] = places
    return slots


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint may hold, by name."""
    return {
        _join(name, attribute): buffer
        for name, module in model.named_modules()
        for attribute, buffer in module._buffers.items()
        if buffer is not None and attribute not in module._non_persistent_buffers_set
    }


def _join(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute
