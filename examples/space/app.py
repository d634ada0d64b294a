"""The demo of scorematch as a Space of the Hugging Face Hub; README.md says which files a Space needs."""

import sys

from scorematch.cli import main

# "mnist" ships with the package. The name of a network on the Hub works too, such as "google/ddpm-cifar10-32".
sys.exit(main(["demo", "mnist", "--host", "0.0.0.0", "--no-browser"]))  # noqa: S104  (a Space serves the public)
