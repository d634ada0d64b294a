"""The documentation is run: the code blocks of its pages, and the doctests of the package."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import scorematch
from scorematch.pretrained import cards

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW_PAGES = {"README", "palette", "restoration", "samplers", "start"}  # they draw many images
MODULES = ["scorematch"] + [
    module.name
    for module in pkgutil.walk_packages(scorematch.__path__, "scorematch.")
    if not module.name.endswith("__main__")
]


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.stem in SLOW_PAGES else (), id=page.stem)
        for page in PAGES
        if _blocks(page, "python")
    ],
)
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in _blocks(page, "python"):
            exec(compile(block, str(page), "exec"), names)  # noqa: S102


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_there_are_doctests():
    finder = doctest.DocTestFinder()
    attempted = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert attempted >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_pages_compiles(page):
    for block in _blocks(page, "python"):
        compile(block, str(page), "exec")


def test_the_readme_begins_with_the_two_commands():
    commands = _blocks(ROOT / "README.md", "bash")[:2]
    assert commands == [
        'pip install ".[images]" && python -m scorematch sample mnist digits.png\n',
        'pip install ".[test]" && python -m pytest\n',
    ]


def test_the_readme_shows_what_its_sampler_prints():
    block = next(block for block in _blocks(ROOT / "README.md", "python") if "print(sampler)" in block)
    shown = re.search(r"print\(sampler\)  # (.*)", block).group(1)
    names = {}
    exec("from scorematch import *\n" + block.split("print(sampler)")[0], names)  # noqa: S102
    assert str(names["sampler"]) == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_card_is_on_the_page_of_trained_networks():
    page = (ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8")
    for card in cards.CARDS:
        levels = f"{card.levels}, {card.sigmas[0]:g} -> {card.sigmas[1]:g}"
        row = next(line for line in page.splitlines() if levels in line and f"`{card.repository or card.name}`" in line)
        assert "x".join(map(str, card.shape)) in row
        assert card.license in row
        assert card.revision is None or card.revision[:12] in row
