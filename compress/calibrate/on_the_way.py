"""Statistics for a run: from a file, or collected just before the work and dropped behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CompressError, Interrupted, UsageError, show

if TYPE_CHECKING:
    from compress.calibrate.statistics import Statistics
    from compress.plan import Plan
    from compress.run import Progress

KINDS = ("text", "sentences", "ids", "images")


@dataclass(frozen=True)
class CalibrateOn:
    """What a user gave to calibrate with: a statistics file, or inputs of one kind, or nothing."""

    stats: Path | None = None
    text: Path | None = None
    sentences: Path | None = None
    ids: Path | None = None
    images: Path | None = None
    samples: int | None = None
    length: int | None = None
    documents: bool = False

    @property
    def inputs(self) -> dict[str, Path | None]:
        """The files of inputs by their option's name."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def is_given(self) -> bool:
        """Whether there is anything to calibrate with."""
        return self.stats is not None or any(self.inputs.values())

    def check(self) -> None:
        """Raises UsageError for options that exclude each other or mean nothing alone."""
        given = [f"--{kind}" for kind, path in self.inputs.items() if path is not None]
        if self.stats is not None and given:
            raise UsageError(
                f"--stats and {given[0]}: both say what to calibrate with", hint="give one of them"
            )
        if len(given) > 1:
            raise UsageError(
                f"{' and '.join(given)}: one kind of calibration inputs at a time",
                hint="give one of them",
            )
        alone = {"--samples": self.samples, "--length": self.length, "--documents": self.documents}
        lonely = [name for name, value in alone.items() if value]
        if lonely and not given:
            raise UsageError(
                f"{lonely[0]}: there are no calibration inputs that it is about",
                hint="give --text, --sentences, --ids or --images",
            )


@dataclass
class Known:
    """The statistics of a run, None where no pass wants any, and what the user should know."""

    statistics: Statistics | None = None
    warnings: list[str] = field(default_factory=list)


@contextmanager
def statistics_for(
    draft: Plan, source: CalibrateOn, out: Path, *, resume: bool, fsync: bool, progress: Progress
) -> Iterator[Known]:
    """The statistics that the passes of a plan want, open while the run lasts.

    draft  made with `calibrated=True`
    Collected ones lie beside `out` under a name of their own, and stay there only where the run is
    interrupted, for `resume`. Raises what reading and calibrating raise.
    """
    from compress.calibrate.statistics import open_statistics

    if source.stats is not None:
        with open_statistics(source.stats) as statistics:
            statistics.check_model(draft.checkpoint)
            yield Known(statistics)
        return
    if not source.is_given:
        yield Known()
        return
    if not any(one.needs or one.welcomes for one in draft.passes):
        unused = "no pass of the recipe makes use of calibration inputs"
        yield Known(warnings=[] if draft.recipe.output.onnx else [unused])  # a graph's proof does
        return
    file = Path(os.path.abspath(out)).with_name(f".{Path(os.path.abspath(out)).name}.statistics")
    keep = False
    try:
        warnings = _collect(draft, source, file, resume=resume, fsync=fsync, progress=progress)
        with open_statistics(file) as statistics:
            yield Known(statistics, warnings)
    except (Interrupted, KeyboardInterrupt):
        keep = True
        raise
    finally:
        if not keep:
            file.unlink(missing_ok=True)


def _collect(
    draft: Plan, source: CalibrateOn, file: Path, *, resume: bool, fsync: bool, progress: Progress
) -> list[str]:
    """Calibrate into `file`, unless an interrupted run has done that. Returns warnings."""
    from compress.calibrate.calibrate import Settings, calibrate, wanted_by
    from compress.calibrate_command import read_inputs

    inputs = read_inputs(
        draft.checkpoint,
        source.inputs,
        documents=source.documents,
        samples=source.samples,
        length=source.length,
        seed=draft.recipe.seed,
    )
    wanted = frozenset[str]().union(*wanted_by(draft)[1].values())
    if resume and _is_that(file, draft, inputs.digest, wanted):
        return []
    settings = Settings(
        overwrite=True,
        resume=resume,
        fsync=fsync,
        seed=draft.recipe.seed,
        module=draft.options.module,
    )
    return list(calibrate(draft, inputs, file, settings, progress).warnings)


def _is_that(file: Path, draft: Plan, digest: str, wanted: frozenset[str]) -> bool:
    """Whether `file` holds what would be collected."""
    from compress.calibrate.statistics import open_statistics

    try:
        with open_statistics(file) as found:
            found.check_model(draft.checkpoint)
            same = found.record.data.get("digest") == digest
            return bool(same and wanted <= found.record.kinds)
    except CompressError:
        return False


def describe(statistics: Statistics) -> dict[str, object]:
    """What a report says of a run's calibration."""
    record = statistics.record
    return {"file": show(statistics.path.name), "engine": record.engine, **record.data}
