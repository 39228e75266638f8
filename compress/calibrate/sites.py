"""Which weights read the same input: found by running the model, by the identity of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.calibrate.collect import SiteSums, module_inputs
from compress.calibrate.statistics import SITE_KINDS
from compress.calibrate.writer import StatisticsWriter


@dataclass
class _OpenSite:
    """Modules that were first given one and the same tensor in one forward pass."""

    names: list[str]
    module: nn.Module
    sums: SiteSums


@dataclass
class _Call:
    """One tensor that modules of one geometry were given in this forward pass."""

    inputs: torch.Tensor
    geometry: Any
    names: list[str]


class SiteCollector:
    """Sums over the inputs of some modules while a model runs.

    modules  by the stored name of their weight, which must be among the wanted
    wanted   kinds by tensor

        with collector.attached():
            for batch in batches:
                with collector.batch(held_out=False): run the model
        collector.write(writer)
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], wanted: Mapping[str, frozenset[str]]
    ) -> None:
        self._modules = {
            name: module for name, module in modules.items() if wanted[name] & SITE_KINDS
        }
        self._wanted = wanted
        self._order = {name: place for place, name in enumerate(self._modules)}
        self._sites: list[_OpenSite] = []
        self._known: set[str] = set()
        self._calls: list[_Call] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the modules."""
        handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, *, held_out: bool) -> Iterator[None]:
        """One forward pass; its inputs are added when it is over."""
        self._calls = []
        try:
            yield
            for call in self._calls:
                self._add(call, held_out)
        finally:
            self._calls = []

    def write(self, writer: StatisticsWriter) -> None:
        """Hand the sites to the writer, in the order of the modules."""
        for site in sorted(self._sites, key=lambda site: self._order[site.names[0]]):
            writer.add_site(site.names, site.sums)

    def _hook(self, name: str) -> Any:
        def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs, shape = arguments[0], geometry(module)
            for call in self._calls:  # tensors are held here, so that none takes another's place
                if call.inputs is inputs and call.geometry == shape:
                    call.names.append(name)
                    return
            self._calls.append(_Call(inputs, shape, [name]))

        return note

    def _add(self, call: _Call, held_out: bool) -> None:
        new = [name for name in dict.fromkeys(call.names) if name not in self._known]
        touched = [site for site in self._sites if site.names[0] in call.names]
        if not new and not touched:
            return
        module = self._modules[call.names[0]]
        values = module_inputs(module, call.inputs)
        for site in touched:
            site.sums.add(values, held_out=held_out)
        if new:
            new.sort(key=self._order.__getitem__)
            kinds = frozenset[str]().union(*(self._wanted[name] for name in new)) & SITE_KINDS
            sums = SiteSums(kinds, values.shape[2], values.shape[0])
            sums.add(values, held_out=held_out)
            self._sites.append(_OpenSite(new, module, sums))
            self._known.update(new)


def geometry(module: nn.Module) -> tuple[Any, ...]:
    """What makes two modules see one tensor differently: a convolution's patches."""
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return tuple(getattr(module, name, None) for name in names)
