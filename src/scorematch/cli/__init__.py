"""The command line, ``python -m scorematch COMMAND``: each command is one module of this package.

To add a command, add a module with a function ``add(commands)``. It registers a parser with ``commands.add_parser`` and
sets its default ``run``, a function that takes the parsed arguments. ``options`` has what several commands share.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import traceback
from typing import Any, NoReturn

from scorematch import __version__


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated options, whose errors are one line. argparse uses its class for the commands too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        # Options are written before or after the command. The default is set by the main parser alone, since that of
        # a command would replace what was read before it.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"scorematch: {message}. Write {self.prog} --help.\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, without the name of the program; None takes those of the process.

    Returns:
        The exit status: 0 for success, 2 for bad input, 1 for an error during the computation, 130 after Ctrl-C. An
        error is one line on stderr, with ``--debug`` a traceback.

    Raises:
        SystemExit: from argparse, with status 2 for arguments that do not fit the command, or 0 after ``--help``.
    """
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        unexpected = isinstance(error, RuntimeError)
        if args.debug:
            traceback.print_exc()
        else:
            hint = " Add --debug for the traceback." if unexpected else ""
            print(f"scorematch: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 1 if unexpected else 2
    except KeyboardInterrupt:
        print("scorematch: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m scorematch",
        description="Score-based image generation.",
        epilog="Example:\n  python -m scorematch sample mnist digits.png",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if hasattr(module, "add"):
            module.add(commands)
    return parser
