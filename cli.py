"""The `fourfold` command: restore photographs, try the tiny models, measure how good a method is."""

import argparse
import logging
import sys
from collections.abc import Sequence

from .commands import demo, evaluate, restore
from .commands.version import package_version

COMMANDS = (demo, restore, evaluate)
INTERRUPTED = 130  # what shells report for Ctrl-C


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; built without importing torch, so that --help answers at once."""
    parser = argparse.ArgumentParser(prog="fourfold", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fourfold {package_version()}")
    parser.add_argument("--verbose", action="store_true", help="show the log and, for errors, the traceback")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 = done, 1 = something failed (said on stderr), 130 = interrupted.

    Raises: SystemExit(2) for wrong usage, as argparse does.
    """
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        if options.verbose:
            logging.getLogger(__name__).exception("%s failed", options.command)
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
