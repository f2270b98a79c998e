"""The command `vlmprune`, also as `python -m vlmprune` (torchrun needs it)."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; quiet too if it is interrupted while the command line is still being imported."""
    try:
        from vlmprune import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
