"""Puts another build of the kernels in the place of the installed one, for checks of the build.

Python imports this at start where PYTHONPATH names the directory; child processes inherit it.
COMPRESS_TEST_EXTENSION is the file that `compress.kernels._cpu` is then loaded from: a build with
sanitizers, or tests/cross/remote.py. A file that is missing or does not load is a broken build.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType


class Substitute:
    """Finds one module, in one file, before any other finder is asked."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "compress.kernels._cpu":
            return None
        return spec_from_file_location(name, os.environ["COMPRESS_TEST_EXTENSION"])


if "COMPRESS_TEST_EXTENSION" in os.environ:
    sys.meta_path.insert(0, Substitute)
