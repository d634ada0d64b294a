"""The program ``scorematch``, or ``python -m scorematch``: the command line, ``scorematch.cli``."""

import signal
import sys


def main() -> int:
    """Imports the command line and runs it; during the imports Ctrl-C ends the program without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is not ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until ``cli.main`` runs a command
    from scorematch import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
