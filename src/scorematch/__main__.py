"""``python -m scorematch``: the command line, ``scorematch.cli``."""

import sys

from scorematch.cli import main

if __name__ == "__main__":
    sys.exit(main())
