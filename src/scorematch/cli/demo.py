"""``scorematch demo``: a page in the browser on which a network draws and restores images."""

from __future__ import annotations

import argparse

from scorematch.cli.options import Commands
from scorematch.cli.options.networks import add_device, add_model, load
from scorematch.cli.options.values import fitting
from scorematch.core.schema import Field
from scorematch.demo.page import build, import_gradio, serve
from scorematch.demo.restorer import Restorer


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "demo",
        help="draw and restore images in the browser",
        description="Opens a page in the browser on which a network draws images and restores pictures, step by step. "
        "It needs the\nextra demo. Without --host and --share, only this computer can open the page. Ctrl-C ends it.",
        epilog="Examples:\n"
        "  %(prog)s\n"
        "  %(prog)s google/ddpm-cifar10-32 --device cuda\n"
        "  %(prog)s ./my-network --port 8000 --no-browser",
    )
    add_model(parser, default="mnist")
    add_device(parser)
    parser.add_argument(
        "--port", type=fitting(Field(int, low=1, high=65_535)), help="the port (default: the first free one from 7860)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="the address to listen at; 0.0.0.0 lets other computers in (default: 127.0.0.1, this computer only)",
    )
    parser.add_argument(
        "--share", action="store_true", help="publish the page on the internet, through a server of gradio.live"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import_gradio()  # before the network is loaded
    net = load(args)
    restorer = Restorer(net)
    page = build(restorer, args.model)
    serve(page, restorer, host=args.host, port=args.port, share=args.share, browser=not args.no_browser)
