"""Every refusal and every estimate, from headers alone, before any work is done."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import formats, layout, patterns, roles, tiles
from compress.buffers import BufferPool
from compress.calibrate.statistics import INPUTS, missing_kinds
from compress.checkpoint import Checkpoint, skeleton
from compress.checkpoint import config as model_config
from compress.errors import ResourceError, UsageError, show
from compress.formats.base import Entry, Format
from compress.machine_memory import usable_memory
from compress.passes.base import NAMED_ROLES, Context, Outlook, Pass, Terms
from compress.plan_warnings import plan_warnings
from compress.recipe import Output, Recipe
from compress.tensor import TensorInfo
from compress.tiles import TensorPlan
from compress.trial import TrialCheckpoint

if TYPE_CHECKING:
    from compress.calibrate.statistics import Statistics, TensorStatistics

# The order in which terms are written; outliers are found on the dense model, before anything.
_STAGES = {"outliers": 0, "mask": 1, "codes": 2, "factors": 3, "values": 4}
_CAST_TAGS = {"bf16": "BF16", "fp16": "F16"}
DEFAULT_MEMORY = 1 << 30


@dataclass(frozen=True)
class Options:
    """How to run, as far as the plan has to know it."""

    format: str | None = None
    untouched: str | None = None
    jobs: int = 0
    memory: int = DEFAULT_MEMORY
    max_shard_bytes: int = layout.MAX_SHARD_BYTES
    module: str | None = None  # FILE.py:FACTORY of a user's own torch module
    onnx: bool = False  # write a graph beside the weights

    @property
    def workers(self) -> int:
        """Threads of the pool."""
        return self.jobs or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Plan:
    """What will happen to every tensor, and the files that come out.

    `passes` are replaced by decided ones as surveys end (`decided`).
    """

    checkpoint: Checkpoint
    recipe: Recipe
    options: Options
    passes: tuple[Pass, ...]
    members: tuple[tuple[TensorInfo, ...], ...]  # per pass: its targets
    format: Format
    format_reason: str
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    tile_bytes: int = field(default=tiles.TILE_BYTES)
    statistics: Statistics | None = None
    following: Statistics | None = None  # of the compressed model's inputs, where passes want them

    @cached_property
    def buffers(self) -> BufferPool:
        """Read buffers of one tile each, shared by the threads."""
        return BufferPool(self.tile_bytes)

    def decided(self, index: int, made: Pass) -> Plan:
        """The plan once pass `index` has decided."""
        passes = (*self.passes[:index], made, *self.passes[index + 1 :])
        return replace(self, passes=passes, tensors=_tensor_plans(self, passes))

    def bound(self, tensor: TensorPlan) -> list[Pass]:
        """The passes that work on a tensor, bound to it."""
        bound: list[Pass] = []
        for index in tensor.steps:
            known = self.following or self.statistics
            of_tensor = None if known is None else known.of(tensor.info)
            context = Context(self.format.base_stands_alone, of_tensor)
            bound.append(self.passes[index].bind(tensor.info, bound, context))
        return bound

    def outlook(
        self, index: int, progress: Callable[[str, int, int], None] | None = None
    ) -> Outlook:
        """What pass `index` may ask about the run."""
        names = {info.name for info in self.members[index]}

        def tensor_bytes(made: Pass) -> dict[str, tuple[int, int]]:
            chosen = (t for t in self.decided(index, made).tensors if t.info.name in names)
            return {t.info.name: layout.bytes_range_of(t, self.format) for t in chosen}

        return Outlook(
            source=self.checkpoint,
            output_bytes=lambda made: self.decided(index, made).bytes_range,
            tensor_bytes=tensor_bytes,
            trial=lambda made: TrialCheckpoint(self.decided(index, made), last=index),
            statistics=self.statistics,
            module=self.options.module,
            workers=self.options.workers,
            **({} if progress is None else {"progress": progress}),
        )

    def statistics_of(self, info: TensorInfo) -> TensorStatistics | None:
        """What calibration knows of a tensor, None without a calibration."""
        return None if self.statistics is None else self.statistics.of(info)

    @property
    def exact(self) -> bool:
        """Whether the output's bytes are known."""
        return self.bytes_range[0] == self.bytes_range[1]

    @cached_property
    def bytes_range(self) -> tuple[int, int]:
        """The output's bytes at least and at most, `report.*` and the manifest apart."""
        low, high = (self.layout(end) for end in (0, 1))
        return low.nbytes + self._slack(low, 0), high.nbytes + self._slack(high, 1)

    def _slack(self, closed: layout.Layout, end: int) -> int:
        """What makes the size of a layout whose open ranges were closed at one end a bound."""
        entries = [Entry(t.info, t.terms) for t in self.tensors]
        files = [f.header_specs for f in (*closed.shards, *closed.parts)]
        return formats.slack(self.format, entries, files, end)

    def layout(self, end: int | None = None) -> layout.Layout:
        """The output's files; `end` closes open ranges at their low (0) or high (1) side."""
        return layout.arrange(
            self.tensors,
            self.format,
            self.checkpoint,
            self.small_files,
            end=end,
            max_shard_bytes=self.options.max_shard_bytes,
        )

    @cached_property
    def small_files(self) -> dict[str, bytes]:
        """config.json without keys that name code, and the resolved recipe."""
        files = {"recipe.yaml": recipe_yaml(self.recipe)}
        config = self.checkpoint.config
        if config is not None and self.checkpoint.config_bytes is not None:
            if model_config.code_keys(config):
                files["config.json"] = _json(model_config.strip_code_keys(config))
            else:
                files["config.json"] = self.checkpoint.config_bytes
        if self.checkpoint.graph is not None:
            files[skeleton.FILE] = self.checkpoint.graph
        return files

    @cached_property
    def peak_memory(self) -> int:
        """Bytes of resident memory that the run stays under."""
        from compress.memory_estimate import peak_memory

        return peak_memory(self)

    @cached_property
    def most_bytes(self) -> int:
        """The output's bytes at most, with what budgets that are not shared out hold it to."""
        pairs = enumerate(zip(self.passes, self.members, strict=True))
        limits = [one.most_bytes(self.outlook(n), list(infos)) for n, (one, infos) in pairs]
        return min([self.bytes_range[1], *(limit for limit in limits if limit is not None)])

    @property
    def reads(self) -> int:
        """Bytes read from the source, at most: the write sweep and every survey."""
        surveys = zip(self.passes, self.members, strict=True)
        return sum(t.info.nbytes for t in self.tensors) + sum(
            one.survey_bytes(list(infos)) for one, infos in surveys
        )

    @property
    def bytes_before(self) -> int:
        """The source's weight files, config and the files that are copied."""
        return (
            sum(self.checkpoint.weight_files.values())
            + len(self.checkpoint.config_bytes or b"")
            + sum(self.layout(1).copies.values())
        )

    @property
    def left_alone(self) -> list[TensorInfo]:
        """Float matrices that no pass works on."""
        return [
            t.info
            for t in self.tensors
            if not t.steps and t.info.is_float and len(t.info.shape) >= 2
        ]

    def check_disk(self, out: Path, more: int = 0) -> None:
        """Refuse (ResourceError) where the output cannot fit, and `more` bytes beside it."""
        folder = Path(os.path.abspath(out)).parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        needed = self.most_bytes + more + (1 << 20)
        if needed > free:
            raise ResourceError(
                f"{show(str(folder))}: {needed:,} bytes needed, {free:,} free",
                hint="free some space or choose another output directory",
            )

    def check_memory(self) -> None:
        """Refuse (ResourceError) where a single tensor does not fit the machine, or its group."""
        available = usable_memory()
        if self.peak_memory <= available:
            return
        largest = max(self.tensors, key=lambda t: t.info.nbytes)
        raise ResourceError(
            f"tensor {show(largest.info.name)}: {self.peak_memory:,} bytes of memory needed, "
            f"{available:,} allowed",
            hint="leave that tensor out with `ignore`, or use fewer --jobs",
        )


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: Options,
    statistics: Statistics | None = None,
    *,
    calibrated: bool = False,
) -> Plan:
    """Resolve targets, order, terms, format and sizes. Raises UsageError or InputError.

    `statistics` are of a calibration that was made; `calibrated`: one will be made before the
    work (a plan for `compress calibrate`), so that what passes need is not missed.
    """
    infos = checkpoint.infos()
    roles.refuse_scaled_fp8(infos)
    output = Output(
        options.format or recipe.output.format,
        options.untouched or recipe.output.untouched,
        options.onnx or recipe.output.onnx or checkpoint.graph is not None,
    )
    recipe = replace(recipe, output=output)  # what is stored is what ran
    passes, notes = _ordered(_seeded(recipe))
    members = tuple(tuple(_targets(p, infos)) for p in passes)
    _one_writer_a_term(passes, members)
    for one, chosen in zip(passes, members, strict=True):
        for info in chosen:
            one.check(info)
        one.check_all(list(chosen))
    draft = Plan(
        checkpoint=checkpoint,
        recipe=recipe,
        options=options,
        passes=passes,
        members=members,
        format=formats.get("native"),
        format_reason="",
        tensors=tuple(TensorPlan(i) for i in infos),
        notes=tuple(notes),
        warnings=tuple(checkpoint.warnings),
        statistics=statistics,
    )
    if not calibrated:
        _require_statistics(draft)
    draft = replace(draft, tensors=_tensor_plans(draft, passes))
    _refuse_idle_factors(draft)
    fmt, reason = _choose_format(draft, output.format)
    recipe = replace(recipe, output=replace(output, format=fmt.name))
    plan = replace(draft, recipe=recipe, format=fmt, format_reason=reason)
    for index, one in enumerate(plan.passes):
        one.check_outlook(plan.outlook(index), list(plan.members[index]))
    calibrated = calibrated or statistics is not None
    return replace(plan, warnings=(*plan.warnings, *plan_warnings(plan, calibrated)))


def recipe_yaml(recipe: Recipe) -> bytes:
    """The resolved recipe as YAML."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    buffer = io.BytesIO()
    yaml.dump(recipe.resolved(), buffer)
    return buffer.getvalue()


def _json(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def alternatives(plan: Plan) -> dict[str, tuple[int, int] | str]:
    """What each format would weigh (at least, at most), or why it cannot hold the result."""
    weights: dict[str, tuple[int, int] | str] = {}
    for name in formats.NAMES:
        fmt = formats.get(name)
        refusal = _refusal(plan, fmt)
        if refusal is not None:
            weights[name] = refusal
            continue
        other = replace(plan, format=fmt)
        weights[name] = other.bytes_range
    return weights


def _seeded(recipe: Recipe) -> tuple[Pass, ...]:
    """Hand the recipe's seed to passes that draw random numbers and have none of their own."""
    return tuple(
        replace(p, seed=recipe.seed)  # type: ignore[call-arg]
        if recipe.seed and getattr(p, "seed", None) == 0
        else p
        for p in recipe.passes
    )


def _ordered(passes: Sequence[Pass]) -> tuple[tuple[Pass, ...], list[str]]:
    """Outliers first, the rest as given; an order that cannot work is refused."""
    notes = []
    if not passes:
        raise UsageError("no pass given", hint="e.g. compress run MODEL -o OUT quantize:bits=4")
    first = [p for p in passes if p.writes == "outliers"]
    rest = [p for p in passes if p.writes != "outliers"]
    if first and tuple(passes[: len(first)]) != tuple(first):
        notes.append(f"{first[0].name} runs first: it reads the dense model and protects the rest")
    for before, after in pairwise(rest):
        if _STAGES[before.writes] > _STAGES[after.writes]:
            why = (
                "it would repair an error that is not made yet and gain nothing"
                if before.writes == "factors"
                else "pruned weights must be known before codes and scales are chosen"
            )
            raise UsageError(
                f"{before.name} before {after.name}: {why}",
                hint=f"put {after.name} before {before.name}",
            )
    for number, one in enumerate(rest):
        later = next(
            (p for p in rest[number + 1 :] if p.writes == "factors" and p.wants_survey), None
        )
        if getattr(one, "size", None) is not None and later is not None:
            raise UsageError(
                f"{one.name}: size={one.size} cannot hold, {later.name} decides after it",  # type: ignore[attr-defined]
                hint=f"give size= to {later.name}, and bpw= to {one.name}",
            )
    return (*first, *rest), notes


def _targets(one: Pass, infos: Sequence[TensorInfo]) -> list[TensorInfo]:
    vectors = one.writes == "values"
    named = one.roles if vectors else NAMED_ROLES
    chosen = patterns.select(infos, one.targets, one.ignore, one.roles, named, vectors=vectors)
    optional = one.writes == "outliers" and not one.targets  # finding none is a result there
    if not chosen and not optional:
        wanted = ", ".join(sorted(r.value for r in one.roles))
        raise UsageError(
            f"{one.name}: no tensor to work on (looked for {wanted} weights)",
            hint="name some with targets=, or see `compress inspect`",
        )
    return chosen


def _require_statistics(plan: Plan) -> None:
    """Refuse passes whose statistics are missing, as a whole or for one tensor."""
    for one, chosen in zip(plan.passes, plan.members, strict=True):
        if not one.needs:
            continue
        if plan.statistics is None:
            raise UsageError(
                f"{one.name}: needs statistics of the model's inputs"
                f" ({', '.join(sorted(one.needs))})",
                hint="give --text F (or --ids, --images) to calibrate on the way, or --stats F from"
                " compress calibrate",
            )
        if INPUTS in one.needs and INPUTS not in plan.statistics.record.kinds:
            raise UsageError(
                f"{one.name}: {show(str(plan.statistics.path))} holds no inputs to run",
                hint="calibrate again with --for and this recipe",
            )
        for info in chosen:
            if missing := missing_kinds(plan.statistics.of(info), one.needs):
                raise UsageError(
                    f"{one.name}: tensor {show(info.name)}: no {missing[0]} was collected for it",
                    hint="calibrate again with --for and this recipe; where calibration does not"
                    " reach the tensor, leave it out with ignore",
                )


def _one_writer_a_term(passes: Sequence[Pass], members: Sequence[Sequence[TensorInfo]]) -> None:
    writers: dict[tuple[str, str], str] = {}
    for one, chosen in zip(passes, members, strict=True):
        for info in chosen:
            key = (info.name, one.writes)
            if key in writers:
                raise UsageError(
                    f"tensor {show(info.name)}: {writers[key]} and {one.name} both write its "
                    f"{one.writes}",
                    hint="give the two passes targets that do not meet (targets=, ignore=)",
                )
            writers[key] = one.name


def _tensor_plans(plan: Plan, passes: Sequence[Pass]) -> tuple[TensorPlan, ...]:
    cast = _CAST_TAGS.get(plan.recipe.output.untouched)
    steps: dict[str, list[int]] = {}
    for index, chosen in enumerate(plan.members):
        for info in chosen:
            steps.setdefault(info.name, []).append(index)
    made = []
    for tensor in plan.tensors:
        info = tensor.info
        own = tuple(steps.get(info.name, ()))
        terms = Terms()
        for index in own:
            terms = passes[index].predict(info, terms)
            if passes[index].name not in terms.passes:
                terms = dataclasses.replace(terms, passes=(*terms.passes, passes[index].name))
        castable = info.dtype in ("F64", "F32", "F16", "BF16") and info.dtype != cast
        made.append(TensorPlan(info, own, terms, cast if castable and not terms.changed else None))
    return tuple(made)


def _choose_format(plan: Plan, wanted: str) -> tuple[Format, str]:
    if wanted == "auto":
        changed, *others = _changed(plan)
        checkpoint = plan.checkpoint
        engines = ("compressed-tensors", "native")
        if checkpoint.graph is not None:
            engines = ("onnx", "native")
        elif plan.recipe.output.onnx:
            engines = ("compressed-tensors", "onnx")
        return formats.choose(
            changed,
            checkpoint.infos(),
            checkpoint.config,
            checkpoint.aliases,
            others=others,
            preferred=engines[0],
            otherwise=engines[1],
        )
    fmt = formats.get(wanted)
    refusal = _refusal(plan, fmt)
    if refusal is not None:
        raise UsageError(
            f"format {wanted} cannot hold the result: {refusal}", hint="use --format native"
        )
    return fmt, "asked for"


def _refusal(plan: Plan, fmt: Format) -> str | None:
    """Why a format cannot hold the result, whatever the passes decide that have not yet."""
    checkpoint = plan.checkpoint
    infos = checkpoint.infos()
    for changed in _changed(plan):
        reason = formats.refusal(fmt, changed, infos, checkpoint.config, checkpoint.aliases)
        if reason is not None:
            return reason
    return None


def _changed(plan: Plan) -> list[dict[str, Terms]]:
    """The changed tensors with their terms: as far as is known, then what else may come out."""
    forms = [
        plan.decided(index, form)
        for index, one in enumerate(plan.passes)
        for form in one.possible(list(plan.members[index]))
    ]
    return [{t.info.name: t.terms for t in p.tensors if t.terms.changed} for p in (plan, *forms)]


def _refuse_idle_factors(plan: Plan) -> None:
    """A residual needs an error to repair: refuse factors where nothing else changes a tensor."""
    for index, one in enumerate(plan.passes):
        if one.writes != "factors":
            continue
        own = [t for t in plan.tensors if index in t.steps]
        if not any(t.terms.codes is not None or t.terms.nonzeros is not None for t in own):
            raise UsageError(
                f"{one.name}: nothing to repair, no other pass works on its tensors",
                hint=f"name one before it: compress run MODEL -o OUT quantize {one.name}",
            )
