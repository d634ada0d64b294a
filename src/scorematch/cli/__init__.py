"""The command line, ``python -m scorematch COMMAND``: each command is one module of this package.

To add a command, add a module with a function ``add(commands)``. It registers a parser with ``commands.add_parser`` and
sets its default ``run``, a function that takes the parsed arguments. ``options`` has the options and functions that
several commands share.
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
    """A parser that accepts no abbreviated options and reports an error in one line. The commands use it too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        # --debug may be written before or after the command. Only the main parser sets its default, since the default
        # of a command's parser would overwrite the value that was parsed before the command.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"scorematch: {message}. See {self.prog} --help.\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, without the name of the program; None uses ``sys.argv[1:]``.

    Returns:
        The exit status: 0 for success, 2 for bad input, 1 for an error during the computation, 130 after Ctrl-C. An
        error prints one line to stderr, or with ``--debug`` the traceback.

    Raises:
        SystemExit: from argparse, with status 2 for invalid arguments, or 0 after ``--help`` and ``--version``.
    """
    args, unknown = _parser().parse_known_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
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
        description="Score-based image generation. Each command has its own help: python -m scorematch COMMAND --help.",
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
