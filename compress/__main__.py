"""`python -m compress`, and the command `compress`."""

from __future__ import annotations

import sys

from compress import interrupts, streams


def main() -> None:
    """Answer signals before the libraries of the command line are imported; then be it."""
    streams.open_closed()
    interrupts.catch()
    try:
        from compress import cli

        cli.main()
    except Exception:
        number = interrupts.arrived()
        if number is None:
            raise
        interrupts.ignore()
        streams.complain("error: interrupted")
        sys.exit(128 + number)
    finally:
        interrupts.ignore()  # the command is over


if __name__ == "__main__":
    main()
