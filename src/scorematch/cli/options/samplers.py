"""How images are drawn: the seed, the sampler and its options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import get_args

from scorematch.cli.options import given
from scorematch.cli.options.networks import add_device
from scorematch.cli.options.values import add_declared
from scorematch.core.arguments import argument
from scorematch.core.schema import Field
from scorematch.core.scores import Score, attribute
from scorematch.restoration.methods import Restore
from scorematch.sampling import SAMPLERS, Sampler, SamplerSettings, recommended_sampler
from scorematch.sampling.ode import Method
from scorematch.sampling.sampler import Option, options_of, restoring_method

# Names of methods in other programs, with the sampler and its options here. For one network call per step, DDIM,
# Euler's method and DPM-Solver++ of order 1 are the same.
_ELSEWHERE = {
    "ddpm": "ancestral",
    **dict.fromkeys(("ddim", "euler"), "ode --method dpm-solver++ --order 1"),
    **dict.fromkeys(("dpm-solver", "dpm++", "dpmpp"), "ode --method dpm-solver++"),
    **{method: f"ode --method {method}" for method in get_args(Method)},
}


def add_computation(parser: argparse.ArgumentParser) -> None:
    """Adds ``--seed``, ``--device`` and ``--quiet``."""
    parser.add_argument(
        "--seed", type=int, default=0, help="the random seed; the same seed gives the same images (default: 0)"
    )
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


_OF_METHOD = ("order", "eta", "coefficients", "churn", "churn_min", "churn_max", "churn_noise")  # belong to one method
_STEPS = ("--steps", "--num-steps", "--num-inference-steps")  # options of other programs


def add_sampling(parser: argparse.ArgumentParser, default: str = "the recommended one") -> None:
    """Adds the options of all commands that sample, except ``-n`` and ``--class``, which differ between commands.

    ``default`` describes the sampler that is used without ``--sampler``; see ``make_sampler``.
    """
    add_computation(parser)
    parser.set_defaults(instead=dict.fromkeys(_STEPS, "Write --calls 8, or the number of noise levels, --levels 18"))
    group = parser.add_argument_group(
        "sampler", "Default options: those that are recommended for the network, or else those of the sampler."
    )
    group.add_argument(
        "--sampler",
        type=_sampler_name,
        choices=SAMPLERS,
        help=f"the sampler (default: the one to which a given option belongs, or {default})",
    )
    add_declared(
        group,
        "calls",
        Field(int, low=1),
        "the recommended settings with the most network calls per image up to this number; to restore, any number from "
        "2 on",
    )
    _add_options(group, options_of(Sampler))
    added: set[str] = set()
    for name in SAMPLERS:
        own = {option: each for option, each in _own_options(name).items() if option not in added}
        added |= own.keys()  # an option that several samplers have is listed with the first
        if own:
            _add_options(parser.add_argument_group(f"options of --sampler {name}"), own)


def _sampler_name(text: str) -> str:
    """A name in ``SAMPLERS``; the name of a method elsewhere is an error that says what it is here."""
    if text not in SAMPLERS and text in _ELSEWHERE:
        raise argparse.ArgumentTypeError(f"{text} is {_ELSEWHERE[text]} here: write --sampler {_ELSEWHERE[text]}")
    return text


def _add_options(group: argparse._ActionsContainer, options: Mapping[str, Option]) -> None:
    for name, (field, text, default) in options.items():
        add_declared(group, name, field, text, default)


def _own_options(sampler: str) -> dict[str, Option]:
    """The options of a sampler without those of all samplers."""
    return {name: option for name, option in options_of(SAMPLERS[sampler]).items() if name not in options_of(Sampler)}


def make_sampler(args: argparse.Namespace, net: Score, *, restore: Restore | None = None) -> Sampler:
    """The sampler of ``--sampler`` and of the options of samplers, or else the one recommended for the network.

    Args:
        args: the parsed command line. Without ``--sampler`` an option of samplers names a sampler that has it.
        net: the score that it samples.
        restore: the method with which it restores measurements, or None if it draws samples.

    Raises:
        ValueError: for an option of another sampler, or a value that is out of range.
    """
    options = given(args, {option: None for name in SAMPLERS for option in _own_options(name)})
    owners = {option: [name for name in SAMPLERS if option in _own_options(name)] for option in options}
    noise, calls = given(args, options_of(Sampler)), getattr(args, "calls", None)
    if calls is not None and (owners or args.sampler is not None):
        raise ValueError(
            f"{argument('calls')} chooses among the recommended settings. Leave it out, or leave out "
            f"{argument('sampler')} and the options of samplers."
        )
    if args.sampler is None and not owners:
        return recommended_sampler(net, calls=calls, restore=restore, **noise)
    # A network that draws has settings for drawing, and one that was trained to restore has settings for restoring.
    restoring = restoring_method(net, restore) is not None
    own: SamplerSettings | None = SamplerSettings("ode") if restoring else attribute(net, "sampler_settings")
    name = args.sampler
    if name is None:
        fitting = [each for each in SAMPLERS if all(each in names for names in owners.values())]
        first = [] if own is None or own.sampler not in fitting else [own.sampler]
        name = [*first, *fitting, *next(iter(owners.values()))][0]
    for option, names in owners.items():
        if name not in names:
            raise ValueError(f"{argument(option)} is an option of --sampler {names[0]}, not of {name}.")
    # AnnealedLangevinSampler reads the network's own settings itself, and adapts them to other options.
    if own is not None and own.sampler == name != "langevin":
        own.check_origin(net)
        recommended = own.options
        if options.get("method") not in (None, recommended.get("method", "heun")):
            recommended = {key: value for key, value in recommended.items() if key not in _OF_METHOD}
        options = {**recommended, **options}
    return recommended_sampler(net, SamplerSettings(name, **options), restore=restore, **noise)
