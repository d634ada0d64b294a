"""``scorematch push``: uploads a network to the Hugging Face Hub."""

from __future__ import annotations

import argparse

from scorematch.cli.options import Commands
from scorematch.cli.options.networks import load_network
from scorematch.cli.options.values import expanded
from scorematch.pretrained.hub import check_login, check_repository


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "push",
        help="upload a network to the Hugging Face Hub",
        description="Uploads a network to the Hugging Face Hub, in one commit, and prints its address. The other "
        "commands then\nload it by the name of the repository. The repository is created if it does not exist, with a "
        "model card. In\nan existing one the network is replaced, and the model card and other files are kept.\n\n"
        "The token of hf auth login is used, or that in the environment variable HF_TOKEN.",
        epilog="Examples:\n  %(prog)s runs/faces me/faces\n  %(prog)s ./cifar10 me/cifar10 --private --license mit",
    )
    parser.add_argument("folder", type=expanded, help="the folder of a network, or of a training run")
    parser.add_argument("repository", help="the repository to write to, owner/name")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--license", help="the license for a new model card, such as mit or apache-2.0")
    parser.add_argument("--message", default="Upload a score network", help="the message of the commit")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    check_repository(args.repository)
    net = load_network(args.folder)
    check_login()
    commit = net.push_to_hub(
        args.repository, license=args.license, private=args.private or None, commit_message=args.message
    )
    print(commit.partition("/commit/")[0])
