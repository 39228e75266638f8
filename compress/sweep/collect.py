"""The statistics that all points of a sweep share."""

from __future__ import annotations

from pathlib import Path

from compress.calibrate.calibrate import Settings, calibrate, wanted_by
from compress.calibrate.inputs import Inputs
from compress.calibrate.statistics import Statistics, missing_kinds, open_statistics
from compress.plan import Plan
from compress.run import Progress
from compress.sweep.sweep import Calibrate


def collector(inputs: Inputs, *, module: str | None = None, seed: int = 0) -> Calibrate:
    """What a sweep calls to calibrate; statistics that an interrupted sweep left are used again."""

    def collect(plan: Plan, path: Path, progress: Progress) -> tuple[Statistics, list[str]]:
        if path.exists():
            found = open_statistics(path)
            if _serves(found, plan, inputs):
                return found, []
            found.close()
        settings = Settings(overwrite=True, fsync=False, seed=seed, module=module)
        made = calibrate(plan, inputs, path, settings, progress)
        return open_statistics(path), list(made.warnings)

    return collect


def _serves(statistics: Statistics, plan: Plan, inputs: Inputs) -> bool:
    """Whether these are of the same model and data and hold all that is needed."""
    _, needed = wanted_by(plan)
    record = statistics.record
    return (
        record.fingerprint == plan.checkpoint.sample_hash()
        and record.data.get("digest") == inputs.digest
        and not any(
            missing_kinds(statistics.of(plan.checkpoint.info(name)), kinds)
            for name, kinds in needed.items()
        )
    )
