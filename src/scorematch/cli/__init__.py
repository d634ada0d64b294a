"""The command line, ``scorematch`` or ``python -m scorematch``: each command is one module of this package.

To add a command, add a module with a function ``add(commands)``. It registers a parser with ``commands.add_parser`` and
sets its default ``run``, a function that takes the parsed arguments. The default ``instead`` says what to write for
options of other programs. ``options`` has the options and functions that
several commands share. In the texts of a parser, ``%(prog)s`` is the command as the user typed it, such as
``scorematch sample``; messages have ``args.program``, which is ``scorematch`` or ``python -m scorematch``.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import pkgutil
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from scorematch import __version__
from scorematch.core.arguments import as_code, written_by

# Errors of the input, with exit status 2. All others have exit status 1.
_BAD_INPUT = (ValueError, TypeError, OSError, ImportError)


class Parser(argparse.ArgumentParser):
    """A parser that accepts no abbreviated options and reports an error in one line. The commands use it too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        # --debug may be written before or after the command. Only the main parser sets its default, since the default
        # of a command's parser would overwrite the value that was parsed before the command.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        self._negative_number_matcher = re.compile(r"-\.?\d")  # as in Python 3.14, for --condition -0.3,0.7
        self.set_defaults(parser=self)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Also accepts an optional argument after options, ``sample mnist -n 4 digits.png``, before Python 3.13."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if len(unknown) == 1 and not unknown[0].startswith("-"):
            for action in self._get_positional_actions():
                if action.nargs == argparse.OPTIONAL and getattr(parsed, action.dest) is action.default:
                    try:
                        setattr(parsed, action.dest, self._get_value(action, unknown.pop()))
                    except argparse.ArgumentError as error:
                        self.error(str(error))
                    break
        return parsed, unknown

    def written(self, name: str, value: Any, of: str | None) -> str:
        """An argument of a function as an option of this command, if there is one: ``--levels``, or ``--levels 18``."""
        actions = {each.dest: each for each in self._actions if each.option_strings}
        without = f"--no-{name.replace('_', '-')}"
        if value is False and without in self._option_string_actions:
            return without
        if name not in actions or value is False:
            return as_code(name, value, of)
        flag, several = actions[name].option_strings[0], actions[name].nargs is not None
        if value is ... or value is True:
            return flag
        words = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
        return shlex.join([flag, *(words if several else ["x".join(words)])])

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"scorematch: {message}. See {self.prog} --help.\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, without the name of the program; None uses ``sys.argv[1:]``.

    Returns:
        The exit status: 0 for success, 2 for bad input, 1 for an error during the computation, 130 after Ctrl-C, 141 if
        the output is closed early. An error prints one line to stderr, or with ``--debug`` the traceback.

    Raises:
        SystemExit: from argparse, with status 2 for invalid arguments, or 0 after ``--help`` and ``--version``.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of characters that its encoding does not have, as stderr
    if sys.stderr is None:  # it was closed before the program began; a progress bar cannot do without it
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    parser, _ = _parsers("scorematch" if Path(sys.argv[0]).stem == "scorematch" else "python -m scorematch")
    args, unknown = parser.parse_known_args(argv)
    args.argv, args.program = sys.argv[1:] if argv is None else argv, parser.prog
    if unknown:
        option = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(option, args.parser._option_string_actions, 1, 0.8)
        advice = getattr(args, "instead", {}).get(option) or (f"The nearest option is {near[0]}" if near else "")
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{f'. {advice}' if advice else ''}")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # during the imports; see ``__main__``
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with warnings.catch_warnings(), written_by(args.parser.written):
            warnings.showwarning = _show_warning
            args.run(args)
            if sys.stdout is not None:  # it is None if the output was closed before the program began
                sys.stdout.flush()
    except BrokenPipeError:  # for example of "scorematch models | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter writes the rest at its end
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        else:
            message = " ".join(_text(error).split())
            if not isinstance(error, (*_BAD_INPUT, RuntimeError)):  # their messages are sentences
                message = ": ".join(filter(None, (type(error).__name__, message)))
            if not isinstance(error, _BAD_INPUT):
                message = f"{message.removesuffix('.')}. Add --debug for the traceback."
            print(f"scorematch: {message}", file=sys.stderr)
        return 2 if isinstance(error, _BAD_INPUT) else 1
    except KeyboardInterrupt:
        if argv is None:  # the program ends now, and a second Ctrl-C would show a traceback of its last functions
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        repeat = "" if getattr(args, "out", None) is None else "repeat the command to continue"
        continues = getattr(args, "continues", repeat)
        print(f"scorematch: interrupted{continues and f'; {continues}'}", file=sys.stderr)
        return 130
    return 0


def _text(error: Exception) -> str:
    """The message of an error; one of the operating system is written as "name: No such file or directory"."""
    if isinstance(error, OSError) and error.strerror:  # str(error) would begin with its number
        return f"{error.filename}: {error.strerror}" if isinstance(error.filename, str) else error.strerror
    return str(error)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Prints a warning in one line, without the line of code that raised it."""
    print(f"scorematch: warning: {' '.join(str(message).split())}", file=sys.stderr)


def parsers(program: str) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands by name, for a program of this name."""
    return _parsers(program)[1]


def _parsers(program: str) -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """The parser of the program, and those of its commands."""
    parser = Parser(
        prog=program,
        description="Score-based image generation. Each command has its own help: %(prog)s COMMAND --help.",
        epilog="Examples:\n"
        "  %(prog)s sample mnist digits.png\n"
        "  %(prog)s train faces --out runs/faces\n"
        "  %(prog)s restore runs/faces/network damaged.png restored --operator mask:observed.png",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if hasattr(module, "add"):
            module.add(commands)
    return parser, dict(commands.choices)
