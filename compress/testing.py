"""The kit that authors of passes run: `check_pass(MyPass, my_option=3)`.

It drives a pass the way the runner does (surveys in order of tiles, then `apply` tile by tile)
over a few small tensors of every working dtype, and fails with an AssertionError that says which
promise of `compress.passes.base.Pass` does not hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from compress.passes.base import Context, Pass, Terms, option_fields
from compress.tensor import Array, Codes, Factors, Outliers, Role, Tensor, TensorInfo

TERMS = {"mask": "mask", "codes": "codes", "factors": "factors", "outliers": "outliers"}
_ZEROS = 0.05  # share of the samples


def make_tensor(
    name: str, values: Array, *, role: Role = Role.LINEAR, shape: tuple[int, ...] | None = None
) -> Tensor:
    """A whole tensor over a matrix [rows, columns], as if read from a checkpoint."""
    tags = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
    tags |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    info = TensorInfo(
        name=name,
        file="model.safetensors",
        dtype=tags[values.dtype.name],
        shape=shape or values.shape,
        nbytes=values.nbytes,
        role=role,
    )
    return Tensor(info, values)


def sample_tensors(seed: int = 0) -> list[Tensor]:
    """Linear weights in bfloat16, float16 and float32, and a convolution; zeros and ties in all."""
    rng = np.random.default_rng(seed)

    def draw(rows: int, columns: int, dtype: Any) -> Array:
        values = rng.standard_t(5, (rows, columns)).astype(np.float32) / 16
        values[rng.random(values.shape) < _ZEROS] = 0
        values[:, : columns // 8] = np.round(values[:, : columns // 8] * 8) / 8  # ties
        return values.astype(dtype)

    return [
        make_tensor("model.layers.0.a.weight", draw(24, 64, ml_dtypes.bfloat16)),
        make_tensor("model.layers.0.b.weight", draw(7, 128, np.float16)),
        make_tensor("model.layers.1.a.weight", draw(16, 96, np.float32)),
        make_tensor("stem.weight", draw(8, 64, np.float32), role=Role.CONV, shape=(8, 16, 2, 2)),
    ]


def tiles_of(tensor: Tensor, rows: int | None) -> list[Tensor]:
    """A whole tensor cut into tiles of some rows, with the terms it carries (not factors)."""
    total = tensor.source.shape[0]
    if rows is None or rows >= total:
        return [tensor]
    tiles = []
    for start in range(0, total, rows):
        part = slice(start, start + rows)
        outliers = tensor.outliers
        if outliers is not None:
            here = (outliers.rows >= start) & (outliers.rows < start + rows)
            outliers = dataclasses.replace(
                outliers,
                rows=outliers.rows[here] - start,
                columns=outliers.columns[here],
                values=outliers.values[here],
            )
        mask = None if tensor.mask is None else tensor.mask[part]
        tiles.append(
            tensor.with_(source=tensor.source[part], first_row=start, mask=mask, outliers=outliers)
        )
    return tiles


def decide(pass_: Pass, tensors: Sequence[Tensor], tile_rows: int | None = None) -> Pass:
    """The pass after its surveys, tiles taken in order as the runner does."""
    infos = [tensor.info for tensor in tensors]
    sweeps = 0
    while pass_.wants_survey:
        sweeps += 1
        if sweeps > 8:  # a pass that never decides would hang the runner
            raise AssertionError(f"{pass_.name}: still wants a survey after {sweeps - 1} sweeps")
        statistic = None
        for tensor in tensors:
            rows = None if pass_.surveys_whole(tensor.info) else tile_rows
            for tile in tiles_of(tensor, rows) if pass_.surveys(tensor.info) else ():
                one = pass_.survey(tile)
                statistic = one if statistic is None else pass_.merge(statistic, one)
        pass_ = pass_.decide(statistic, infos)
    return pass_


def run_pass(
    pass_: Pass, tensors: Sequence[Tensor], tile_rows: int | None = None
) -> tuple[Pass, list[Tensor]]:
    """Check, survey, decide and apply in memory: the decided pass and the whole tensors.

    Tensors for which the pass is not row-wise are applied whole, the others by tiles.
    """
    infos = [tensor.info for tensor in tensors]
    pass_.validate()
    for info in infos:
        pass_.check(info)
    pass_.check_all(infos)
    decided = decide(pass_, tensors, tile_rows)
    results = []
    for tensor in tensors:
        bound = decided.bind(tensor.info, (), Context())
        rows = tile_rows if bound.row_wise(tensor.info) else None
        results.append(join([bound.apply(tile) for tile in tiles_of(tensor, rows)]))
    return decided, results


def join(tiles: Sequence[Tensor]) -> Tensor:
    """Tiles of one tensor, in order, as the whole tensor."""
    first = tiles[0]
    if len(tiles) == 1:
        return first
    notes: dict[str, float] = {}
    for tile in tiles:
        for key, value in tile.notes.items():
            notes[key] = notes.get(key, 0.0) + value
    return first.with_(
        source=np.concatenate([tile.source for tile in tiles]),
        mask=None if first.mask is None else np.concatenate([_given(t.mask) for t in tiles]),
        codes=_join_codes([tile.codes for tile in tiles if tile.codes is not None]),
        outliers=_join_outliers(tiles),
        notes=notes,
    )


def _join_codes(codes: list[Codes]) -> Codes | None:
    if not codes:
        return None
    points = [one.zero_point for one in codes if one.zero_point is not None]
    return dataclasses.replace(
        codes[0],
        values=np.concatenate([one.values for one in codes]),
        scale=np.concatenate([one.scale for one in codes]),
        zero_point=np.concatenate(points) if points else None,
    )


def _join_outliers(tiles: Sequence[Tensor]) -> Outliers | None:
    found = [(tile.first_row, tile.outliers) for tile in tiles if tile.outliers is not None]
    if not found:
        return None
    return dataclasses.replace(
        found[0][1],
        rows=np.concatenate([outliers.rows + first for first, outliers in found]),
        columns=np.concatenate([outliers.columns for _, outliers in found]),
        values=np.concatenate([outliers.values for _, outliers in found]),
    )


def _given(array: Array | None) -> Array:
    if array is None:
        raise AssertionError("one tile has a mask and another has none")
    return array


# ---------------------------------------------------------------- checks


def check_pass(
    cls: type[Pass], *, tensors: Sequence[Tensor] | None = None, **options: Any
) -> tuple[Pass, list[Tensor]]:
    """Check the promises of a pass with these options, over `sample_tensors()` or others.

    Returns the decided pass and what it made of the tensors, for further assertions.
    Raises AssertionError for the first promise that does not hold.
    """
    _check_class(cls)
    given = list(tensors) if tensors is not None else sample_tensors()
    before = [tensor.source.tobytes() for tensor in given]
    for tensor in given:
        tensor.source.flags.writeable = False
    pass_ = cls(**options)
    predicted = _predictions(pass_, given)
    decided, results = run_pass(pass_, given)
    for tensor, bytes_ in zip(given, before, strict=True):
        _require(tensor.source.tobytes() == bytes_, cls, "apply changed the source")
    _require(pass_ == cls(**options), cls, "deciding changed the pass it started from")
    _check_json(decided)
    exact = _predictions(decided, given)
    for tensor, result, bounds, terms in zip(given, results, predicted, exact, strict=True):
        _check_result(cls, tensor, result)
        _check_terms(cls, result, bounds, "before its survey")
        _check_terms(cls, result, terms, "once decided")
    _, again = run_pass(cls(**options), given)
    _check_same(cls, results, again, "a second run")
    for rows in (1, 3, 5):
        _, tiled = run_pass(cls(**options), given, rows)
        _check_same(cls, results, tiled, f"tiles of {rows} rows")
    return decided, results


def _require(holds: bool, cls: type[Pass], what: str) -> None:
    if not holds:
        raise AssertionError(f"{cls.__name__}: {what}")


def _check_class(cls: type[Pass]) -> None:
    _require(dataclasses.is_dataclass(cls), cls, "is not a dataclass")
    params: Any = getattr(cls, "__dataclass_params__", None)
    _require(bool(params and params.frozen), cls, "is not frozen: @dataclass(frozen=True)")
    _require("__dataclass_params__" in vars(cls), cls, "is not itself decorated with @dataclass")
    _require(isinstance(getattr(cls, "name", None), str), cls, "has no name")
    _require(getattr(cls, "writes", None) in TERMS, cls, f"writes none of {', '.join(TERMS)}")
    _require(bool((cls.__doc__ or "").strip()), cls, "has no docstring")
    instance = cls()
    names: dict[str, str] = {}
    for field in option_fields(cls):
        data = field.metadata
        keys = {"help", "low", "high", "choices", "aliases"}
        _require(keys <= set(data), cls, f"{field.name}: use option(...)")
        _require(bool(data["help"].strip()), cls, f"{field.name} has no help")
        _require("\n" not in data["help"], cls, f"{field.name}: help is one line")
        value = getattr(instance, field.name)
        if data["choices"]:
            _require(value in data["choices"], cls, f"{field.name}: default is not a choice")
        if isinstance(value, int | float) and not isinstance(value, bool):
            _require(
                data["low"] is None or value >= data["low"], cls, f"{field.name}: default too low"
            )
            _require(
                data["high"] is None or value <= data["high"],
                cls,
                f"{field.name}: default too high",
            )
        for spelling in (field.name, *data["aliases"]):
            _require(spelling not in names, cls, f"{spelling} means two options")
            names[spelling] = field.name
    instance.validate()


def _check_json(pass_: Pass) -> None:
    import json

    try:
        json.dumps(pass_.facts(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{type(pass_).__name__}: facts() is not JSON: {error}") from error


def _predictions(pass_: Pass, tensors: Sequence[Tensor]) -> list[Terms]:
    found = []
    for tensor in tensors:
        carried = tensor.outliers
        start = Terms()
        if carried is not None:
            count = int(carried.rows.size)
            columns = int(np.unique(carried.columns).size)
            start = Terms(outliers=(count, count), outlier_columns=(columns, columns))
        bound = pass_.bind(tensor.info, (), Context())
        found.append(bound.predict(tensor.info, start))
    return found


def _check_result(cls: type[Pass], before: Tensor, after: Tensor) -> None:
    name = before.info.name
    _require(after.info == before.info, cls, f"{name}: apply changed the header")
    _require(
        after.source.dtype == before.source.dtype
        and np.array_equal(after.source.view(np.uint8), before.source.view(np.uint8)),
        cls,
        f"{name}: apply replaced the source",
    )
    writes = TERMS[cls.writes]
    for term in TERMS.values():
        may = term == writes or (writes == "factors" and term == "codes")  # low-rank may rewrite
        same = _term_bytes(getattr(before, term)) == _term_bytes(getattr(after, term))
        _require(may or same, cls, f"{name}: wrote {term}, but declares {cls.writes}")
    rows, columns = before.source.shape
    if after.mask is not None:
        _require(after.mask.dtype == np.bool_, cls, f"{name}: the mask is not bool")
        _require(after.mask.shape == (rows, columns), cls, f"{name}: the mask's shape is wrong")
    if after.codes is not None:
        _check_codes(cls, name, after.codes, rows, columns)
    if after.outliers is not None:
        _check_outliers(cls, name, after, after.outliers)
    decoded = after.decode()
    _require(decoded.dtype == np.float32, cls, f"{name}: decodes to {decoded.dtype.name}")
    _require(decoded.shape == (rows, columns), cls, f"{name}: decodes to shape {decoded.shape}")
    _require(bool(np.isfinite(decoded).all()), cls, f"{name}: decodes to a NaN or an infinity")


def _check_codes(cls: type[Pass], name: str, codes: Codes, rows: int, columns: int) -> None:
    _require(codes.values.dtype == np.uint8, cls, f"{name}: codes are not uint8")
    _require(codes.values.shape == (rows, columns), cls, f"{name}: the codes' shape is wrong")
    top = int(codes.values.max(initial=0))
    _require(top < 2**codes.bits, cls, f"{name}: code {top} does not fit {codes.bits} bits")
    groups = -(-columns // codes.group_size)
    per_group = codes.scale.shape == (rows, groups)
    _require(
        per_group or codes.scale.shape == (1, 1), cls, f"{name}: scale shape {codes.scale.shape}"
    )
    if codes.zero_point is not None:
        _require(codes.zero_point.dtype == np.uint8, cls, f"{name}: zero points are not uint8")
        _require(
            codes.zero_point.shape == codes.scale.shape, cls, f"{name}: zero points unlike scales"
        )


def _check_outliers(cls: type[Pass], name: str, tensor: Tensor, outliers: Outliers) -> None:
    places = list(zip(outliers.rows.tolist(), outliers.columns.tolist(), strict=True))
    _require(places == sorted(set(places)), cls, f"{name}: outliers are not sorted and distinct")
    _require(outliers.values.dtype == tensor.source.dtype, cls, f"{name}: outliers' dtype")
    exact = tensor.source[outliers.rows, outliers.columns]
    _require(
        exact.tobytes() == outliers.values.tobytes(), cls, f"{name}: outliers are not the source's"
    )


def _check_terms(cls: type[Pass], tensor: Tensor, terms: Terms, when: str) -> None:
    """Whether what was predicted came true."""
    where = f"{tensor.info.name}, predicted {when}:"
    if tensor.mask is not None:
        kept = int(np.count_nonzero(tensor.mask))
        _require(
            terms.nonzeros is not None and terms.nonzeros[0] <= kept <= terms.nonzeros[1],
            cls,
            f"{where} {kept} weights kept, not {terms.nonzeros}",
        )
    else:
        _require(terms.nonzeros is None, cls, f"{where} no mask, but nonzeros {terms.nonzeros}")
    _require((tensor.codes is None) == (terms.codes is None), cls, f"{where} codes {terms.codes}")
    if tensor.codes is not None and terms.codes is not None:
        spec, codes = terms.codes, tensor.codes
        fewest = spec.bits if spec.least is None else spec.least.bits
        _require(
            fewest <= codes.bits <= spec.bits,
            cls,
            f"{where} {codes.bits} bits, not {fewest} to {spec.bits}",
        )
        _require(
            spec.symmetric == (codes.zero_point is None), cls, f"{where} symmetric={spec.symmetric}"
        )
        groups = spec.groups(tensor.source.shape[1])
        _require(
            groups == codes.scale.shape[1] or spec.least is not None,
            cls,
            f"{where} {groups} groups a row",
        )
        tags = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
        _require(
            tags[codes.scale.dtype.name] == spec.scale_dtype,
            cls,
            f"{where} scale {spec.scale_dtype}",
        )
    rank = 0 if tensor.factors is None else tensor.factors.rank
    lowest = terms.rank if terms.least_rank is None else terms.least_rank
    _require(
        lowest <= rank <= terms.rank, cls, f"{where} rank {rank}, not {lowest} to {terms.rank}"
    )
    outliers = tensor.outliers
    count = 0 if outliers is None else int(outliers.rows.size)
    columns = 0 if outliers is None else int(np.unique(outliers.columns).size)
    low, high = terms.outliers
    _require(low <= count <= high, cls, f"{where} {count} outliers, not {terms.outliers}")
    low, high = terms.outlier_columns
    _require(low <= columns <= high, cls, f"{where} {columns} outlier columns, not {(low, high)}")
    _require(cls.name in terms.passes or not _wrote(tensor, cls), cls, f"{where} passes lacks it")


def _wrote(tensor: Tensor, cls: type[Pass]) -> bool:
    return getattr(tensor, TERMS[cls.writes]) is not None


def _check_same(cls: type[Pass], one: Sequence[Tensor], other: Sequence[Tensor], what: str) -> None:
    for a, b in zip(one, other, strict=True):
        for term in TERMS.values():
            same = _term_bytes(getattr(a, term)) == _term_bytes(getattr(b, term))
            _require(same, cls, f"{a.info.name}: {what} gave other {term}")


def _term_bytes(term: Array | Codes | Factors | Outliers | None) -> list[Any]:
    """A term as comparable values."""
    if term is None:
        return []
    if isinstance(term, np.ndarray):
        return [term.dtype.name, term.shape, term.tobytes()]
    values: list[Any] = []
    for field in dataclasses.fields(term):
        value = getattr(term, field.name)
        values += _term_bytes(value) if isinstance(value, np.ndarray) else [value]
    if isinstance(term, Outliers) and not term.rows.size:
        return []  # no outliers and none at all decode alike
    return values
