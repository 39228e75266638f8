"""The commit routine of `Stage` for an output that is a single file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from compress.checkpoint.destination import check_place
from compress.checkpoint.stage import Stage
from compress.errors import CompressError, UsageError, show


class FileStage(Stage):
    """A stage OUT.partial from which one file becomes OUT.

    file  where the content is written
    is_ours  raises CompressError for an existing OUT that `overwrite` may not replace
    """

    def __init__(
        self, out: Path, *, overwrite: bool, is_ours: Callable[[Path], None], fsync: bool = True
    ) -> None:
        super().__init__(out, overwrite=overwrite, fsync=fsync)
        self.file = self._result = self.path / self.out.name
        self._is_ours = is_ours

    def _check_out(self) -> None:
        check_place(self.out)
        if not os.path.lexists(self.out):
            return
        where = f"output {show(str(self.out))}"
        if self.out.is_symlink() or not self.out.is_file():
            raise UsageError(f"{where} exists and is not a file", hint="choose another name")
        if not self._overwrite:
            raise UsageError(f"{where} exists", hint="--overwrite replaces it; or choose another")
        try:
            self._is_ours(self.out)
        except CompressError as error:
            raise UsageError(
                f"{where} is not this tool's to replace ({error.message})",
                hint="remove it yourself or choose another",
            ) from error
