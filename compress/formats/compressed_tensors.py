"""The format that transformers and vLLM load: `quant_method: compressed-tensors`.

Linear weights of 2, 4 or 8 symmetric bits become `pack-quantized` modules, embeddings 8-bit
`naive-quantized` ones, and low-rank factors a LoRA adapter beside them. A module's name in a
loaded model may have another prefix than in the file, so targets match the end of a name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from compress.errors import show
from compress.formats import peft
from compress.formats.arrays import (
    collision,
    pack_rows,
    pack_super_weights,
    plain,
    plain_layout,
    stand_in,
    super_weight_layout,
    tile_of,
    unpack_rows,
    unpack_super_weights,
)
from compress.formats.base import MODEL, ArraySpec, Entry, Fetch, Format, Named
from compress.passes.base import CodesSpec, Terms
from compress.tensor import Array, Codes, Role, Tensor, TensorInfo

WIDTHS = (2, 4, 8)
TABLE_BITS = 8
MATRIX = 2  # dimensions
PACKED, NAIVE, MIXED = "pack-quantized", "naive-quantized", "mixed-precision"
_LINEAR_ROLES = frozenset({Role.LINEAR, Role.HEAD})
_TABLE_ROLES = frozenset({Role.EMBEDDING, Role.POSITION})
# What a model's outermost module is called where a checkpoint may or may not carry its name.
_OUTER_NAMES = frozenset({"model", "transformer"})
# Classes of models whose output layer may share the embedding's weights.
_HEAD_CLASS = re.compile(
    r"CausalLM|MaskedLM|LMHead|DoubleHeads|ConditionalGeneration|PreTraining|Seq2SeqLM"
)


class CompressedTensors(Format):
    """pack-quantized Linear modules, int8 embeddings, everything else as it was."""

    name: ClassVar[str] = "compressed-tensors"
    base_stands_alone: ClassVar[bool] = True

    def refuses(self, info: TensorInfo, terms: Terms) -> str | None:
        """What the engines' loaders do not take."""
        if reason := peft.refuses(info, terms):
            return reason
        if terms.codes is None:
            return None
        return _refuses_codes(info, terms.codes)

    def refuses_model(
        self,
        changed: Mapping[str, Terms],
        infos: Sequence[TensorInfo],
        config: Mapping[str, Any] | None,
        aliases: Mapping[str, str] | None = None,
    ) -> str | None:
        """A missing config.json, fused sets of unequal schemes, tied weights, taken names."""
        if config is None:
            return "there is no config.json to record the quantization in"
        quantized = {name for name, terms in changed.items() if terms.codes is not None}
        if reason := _refuses_tied(quantized, infos, config):
            return reason
        if reason := _refuses_aliases(changed, aliases or {}):
            return reason
        if reason := _refuses_fused(changed, infos):
            return reason
        layouts = [(i, self.layout(i, changed[i.name])) for i in infos if i.name in changed]
        return collision(layouts, infos)

    def layout(self, info: TensorInfo, terms: Terms) -> list[ArraySpec]:
        """weight_packed, weight_scale, weight_shape; or weight and weight_scale of a table."""
        specs = plain_layout(info) if terms.codes is None else _codes_layout(info, terms.codes)
        return specs + peft.layout(info, terms) + super_weight_layout(info, terms)

    def pack(self, tensor: Tensor, terms: Terms) -> Named:
        """The arrays of one tile; `weight_shape`, which has no rows, comes with the first."""
        named: Named = {}
        if tensor.codes is None:
            values = plain(tensor.with_(factors=None))
            named[MODEL, tensor.info.name] = tile_of(tensor.info, tensor, values)
        else:
            _pack_codes(tensor, tensor.codes, named)
        peft.pack(tensor, terms, named)
        return named | pack_super_weights(tensor)

    def unpack(self, entry: Entry, fetch: Fetch) -> Tensor:
        """The tensor with its terms; a mask is gone, its zeros are in the codes."""
        info, terms = entry.info, entry.terms
        codes, source = None, stand_in(info)
        if terms.codes is None:
            source = info.to_matrix(fetch(MODEL, info.name))
        else:
            codes = _unpack_codes(info, terms.codes, fetch)
        return Tensor(
            info,
            source,
            codes=codes,
            factors=peft.unpack_factors(info, terms, fetch),
            outliers=unpack_super_weights(info, terms, fetch, in_scale=True),
        )

    def extra_files(
        self, entries: Sequence[Entry], config: dict[str, Any] | None, infos: Sequence[TensorInfo]
    ) -> dict[str, bytes]:
        """config.json with its `quantization_config`, and the adapter's config."""
        files = peft.config_files(entries)
        schemes = _schemes(entries)
        if config is not None and schemes:
            files["config.json"] = _config_json(schemes, config, infos)
        return files

    def slack(self, entries: Sequence[Entry]) -> tuple[int, int]:
        """Ranks in adapter_config.json and modules in config.json, listed where they differ."""
        below, above = peft.config_slack(entries)
        codes = [(e.info.module, e.terms.codes) for e in entries if e.terms.codes is not None]
        if any(c.least is not None for _, c in codes):
            # A pattern is at most twice as long as what it matches; a group of each width.
            listed = 400 * len(WIDTHS) + sum(2 * len(module) + 40 for module, _ in codes)
            below, above = below + listed, above + listed
        return below, above

    def notes(self, terms: Sequence[Terms], infos: Sequence[TensorInfo]) -> list[str]:
        """How to load the adapter, where there is one."""
        return peft.notes([Entry(i, t) for i, t in zip(infos, terms, strict=True)])


# -- refusals --------------------------------------------------------------------------------


def _refuses_codes(info: TensorInfo, codes: CodesSpec) -> str | None:
    columns = info.matrix_shape[1]
    if info.role not in _LINEAR_ROLES | _TABLE_ROLES:
        return (
            f"codes of a tensor of role {info.role.value}: only Linear and Embedding modules load"
        )
    if not info.name.endswith(".weight") or len(info.shape) != MATRIX:
        return "it is not the weight matrix of a module (its name does not end in .weight)"
    if info.dtype not in ("F32", "F16", "BF16"):
        return f"its dtype {info.dtype}: the engines decode to F32, F16 or BF16"
    if not codes.symmetric:
        return "zero points: current loaders reject asymmetric codes"
    if info.role in _TABLE_ROLES and codes.bits != TABLE_BITS:
        return f"a {codes.bits}-bit embedding: embeddings load as 8 bits"
    if codes.bits not in WIDTHS:
        return f"{codes.bits}-bit codes: engines take 2, 4 or 8 bits"
    if _is_grouped(codes, columns) and columns % codes.group_size:
        return f"groups of {codes.group_size} do not divide its {columns} columns"
    return None


def _refuses_tied(
    quantized: set[str], infos: Sequence[TensorInfo], config: Mapping[str, Any]
) -> str | None:
    """Integer codes of a tensor that a loader may share between two modules.

    Sharing happens after loading, by the config: the other module then gets the codes as if
    they were weights (an error at best, wrong results at worst), so a doubt refuses.
    """
    ends = (Role.EMBEDDING, Role.HEAD)
    coded = [i for i in infos if i.role in ends and i.name in quantized]
    if not coded:
        return None
    what = f"{coded[0].role.value} {show(coded[0].name)}"
    if config.get("is_encoder_decoder") is True and coded[0].role is Role.EMBEDDING:
        return f"the {what} is shared by encoder and decoder"
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    if config.get("tie_word_embeddings", inner) is False:
        return None
    if not any(i.role is Role.HEAD for i in infos) and not _has_head(config):
        return None
    return f"config.json does not say tie_word_embeddings: false, so the {what} may be tied"


def _refuses_aliases(changed: Mapping[str, Terms], aliases: Mapping[str, str]) -> str | None:
    """Codes or factors of a tensor that another module shares under a name that is not stored.

    Engines see the arrays of one module only and would give the other one random weights.
    """
    for alias, kept in sorted(aliases.items()):
        terms = changed.get(kept)
        if terms is not None and (terms.codes is not None or terms.rank):
            return f"tensor {show(kept)} is also stored for {show(alias)}, which would be lost"
    return None


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether the model's class has a language-model head, as far as its name tells."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes:
        return True
    return any(not isinstance(c, str) or _HEAD_CLASS.search(c) is not None for c in classes)


def _refuses_fused(changed: Mapping[str, Terms], infos: Sequence[TensorInfo]) -> str | None:
    from compress.roles import fused_sets

    columns = {info.name: info.matrix_shape[1] for info in infos}
    for names in fused_sets(list(infos)):
        schemes = {name: _scheme_of(changed.get(name), columns[name]) for name in names}
        if len(set(schemes.values())) > 1:
            shown = ", ".join(f"{show(n)} {_describe(s)}" for n, s in schemes.items())
            return f"engines fuse these, so they need one width and group: {shown}"
    return None


def _scheme_of(terms: Terms | None, columns: int) -> tuple[int, int] | None:
    """(bits, group; 0 for whole rows), None for a tensor without codes."""
    if terms is None or terms.codes is None:
        return None
    return terms.codes.bits, terms.codes.group_size if _is_grouped(terms.codes, columns) else 0


def _describe(scheme: tuple[int, int] | None) -> str:
    if scheme is None:
        return "(no codes)"
    bits, group = scheme
    return f"({bits} bits, " + (f"groups of {group})" if group else "whole rows)")


def _is_grouped(codes: CodesSpec, columns: int) -> bool:
    return not codes.per_tensor and codes.group_size < columns


# -- arrays ----------------------------------------------------------------------------------


def _codes_layout(info: TensorInfo, codes: CodesSpec) -> list[ArraySpec]:
    rows, columns = info.matrix_shape
    # One scale a tensor is written once a row: no engine takes a scale without rows.
    scale = ArraySpec(
        MODEL, f"{info.module}.weight_scale", codes.scale_dtype, (rows, codes.groups(columns))
    )
    if info.role in _TABLE_ROLES:
        return [ArraySpec(MODEL, info.name, "I8", (rows, columns)), scale]
    words = -(-columns * codes.bits // 32)
    return [
        ArraySpec(MODEL, f"{info.module}.weight_packed", "I32", (rows, words)),
        scale,
        ArraySpec(MODEL, f"{info.module}.weight_shape", "I64", (2,)),
    ]


def _pack_codes(tensor: Tensor, codes: Codes, named: Named) -> None:
    info = tensor.info
    rows, columns = codes.values.shape
    scale = np.broadcast_to(codes.scale, (rows, codes.scale.shape[1]))
    named[MODEL, f"{info.module}.weight_scale"] = np.ascontiguousarray(scale)
    if info.role in _TABLE_ROLES:
        # Offset binary to two's complement: flip the sign bit.
        named[MODEL, info.name] = (codes.values ^ np.uint8(0x80)).view(np.int8)
        return
    row_bytes = 4 * -(-columns * codes.bits // 32)
    packed: Array = pack_rows(codes.values, codes.bits, row_bytes).view(np.dtype("<i4"))
    named[MODEL, f"{info.module}.weight_packed"] = packed
    if tensor.first_row == 0:
        named[MODEL, f"{info.module}.weight_shape"] = np.array(info.shape, np.int64)


def _unpack_codes(info: TensorInfo, spec: CodesSpec, fetch: Fetch) -> Codes:
    columns = info.matrix_shape[1]
    scale = fetch(MODEL, f"{info.module}.weight_scale")
    if spec.per_tensor:
        scale = np.ascontiguousarray(scale[:1])
    if info.role in _TABLE_ROLES:
        values = fetch(MODEL, info.name).view(np.uint8) ^ np.uint8(0x80)
    else:
        words = np.ascontiguousarray(fetch(MODEL, f"{info.module}.weight_packed"))
        values = unpack_rows(words.view(np.uint8), spec.bits, columns)
    group = spec.group_size if _is_grouped(spec, columns) else max(columns, 1)
    return Codes(values, scale, None, spec.bits, group)


# -- config.json -----------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class _Scheme:
    """What the modules of one config group have in common; `group` 0 is a scale a row."""

    kind: str
    bits: int
    group: int


def _config_json(
    schemes: Mapping[str, _Scheme], config: dict[str, Any], infos: Sequence[TensorInfo]
) -> bytes:
    """The source's config.json in its own order, plus `quantization_config`."""
    from compress.checkpoint.config import strip_code_keys

    changed = strip_code_keys(config)
    changed["quantization_config"] = _quantization_config(schemes, config, infos)
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _schemes(entries: Iterable[Entry]) -> dict[str, _Scheme]:
    """The scheme of every module with codes."""
    schemes = {}
    for entry in entries:
        codes = entry.terms.codes
        if codes is not None:
            kind = NAIVE if entry.info.role in _TABLE_ROLES else PACKED
            grouped = _is_grouped(codes, entry.info.matrix_shape[1])
            schemes[entry.info.module] = _Scheme(
                kind, codes.bits, codes.group_size if grouped else 0
            )
    return schemes


def _quantization_config(
    schemes: Mapping[str, _Scheme], config: Mapping[str, Any], infos: Sequence[TensorInfo]
) -> dict[str, Any]:
    # vLLM wants every Linear to be a target or ignored; modules are told apart by their weights.
    modules = {i.module for i in infos if i.name.endswith(".weight") and len(i.shape) == MATRIX}
    modules |= schemes.keys()
    prefixes = _OUTER_NAMES | {str(config.get("model_type"))}
    groups = {}
    for number, scheme in enumerate(sorted(set(schemes.values()))):
        members = {module for module, found in schemes.items() if found == scheme}
        groups[f"group_{number}"] = _config_group(scheme, targets(members, modules, prefixes))
    others = {
        i.module
        for i in infos
        if i.module in modules - schemes.keys() and i.role not in _TABLE_ROLES
    }
    ignore = targets(others, modules, prefixes)
    if not any(i.role is Role.HEAD for i in infos) and "lm_head" not in schemes:
        ignore.append("lm_head")  # a tied head exists in the model but not in the file
    kinds = {scheme.kind for scheme in schemes.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": groups,
    }


def _config_group(scheme: _Scheme, names: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group else "channel",
        "dynamic": False,
    }
    if scheme.group:
        weights["group_size"] = scheme.group
    return {
        "targets": names,
        "format": scheme.kind,
        "input_activations": None,
        "output_activations": None,
        "weights": weights,
    }


def targets(members: set[str], modules: set[str], prefixes: frozenset[str] | set[str]) -> list[str]:
    """Patterns that match every member and no other module, whatever prefix a model adds.

    Members that differ only in their numbers (layers) share one pattern where all modules of
    that form are members. Raises ValueError where no pattern tells two modules apart.
    """
    forms: dict[str, set[str]] = {}
    for module in modules:
        forms.setdefault(_form(module), set()).add(module)
    patterns = []
    for form in sorted({_form(member) for member in members}):
        if forms[form] <= members:
            patterns += [_pattern(_inner(form, prefixes), form, members, modules)]
        else:
            for module in sorted(forms[form] & members, key=_natural):
                exact = re.escape(module)
                patterns.append(_pattern(_inner(exact, prefixes), exact, members, modules))
    return patterns


def _pattern(short: str, full: str, members: set[str], modules: set[str]) -> str:
    """The most tolerant of three spellings that matches members only."""
    for pattern in (rf"(.*\.)?{short}$", rf"(.*\.)?{full}$", rf"{full}$"):
        if not any(re.match(pattern, other) for other in modules - members):
            return f"re:{pattern}"
    raise ValueError(f"no pattern tells {full} from the other modules")


def _form(module: str) -> str:
    """A module's name as a pattern in which every number stands for any number."""
    parts = (r"\d+" if part.isdecimal() else re.escape(part) for part in module.split("."))
    return r"\.".join(parts)


def _inner(pattern: str, prefixes: frozenset[str] | set[str]) -> str:
    """The pattern without the outermost module's name, if it is one that models drop or add."""
    first, dot, rest = pattern.partition(r"\.")
    return rest if dot and first in prefixes else pattern


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: layer 2 before layer 10."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in name.split(".")]
