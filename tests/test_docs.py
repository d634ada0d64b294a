"""Runs the documentation: the code blocks of the pages, and the doctests of the package."""

import doctest
import importlib
import pkgutil
import re
import shlex
import sys
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch

import scorematch
from scorematch import cli
from scorematch.charts import Curve, chart
from scorematch.pretrained import cards

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their code draws many images, or trains.
SLOW_PAGES = {
    "README",
    "evaluation",
    "extending",
    "guidance",
    "index",
    "palette",
    "recipes",
    "restoration",
    "samplers",
    "schedules",
    "speed",
    "start",
    "training",
}
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
    monkeypatch.setenv("SCOREMATCH_CACHE", str(tmp_path / "cache"))
    names = {"__name__": page.stem}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in _blocks(page, "python"):
            exec(compile(block, str(page), "exec"), names)  # noqa: S102


def test_the_block_for_lightning_runs(tmp_path, monkeypatch):
    """With the documented order of hooks in place of Lightning, which is not installed."""

    class Module(torch.nn.Module):
        def log(self, name, value):
            assert torch.isfinite(value)

    class Trainer:
        def __init__(self, *, max_epochs, gradient_clip_val):
            self.epochs, self.norm = max_epochs, gradient_clip_val

        def fit(self, module, loader):
            optimizer = module.configure_optimizers()
            for _ in range(self.epochs):
                for i, batch in enumerate(loader):
                    optimizer.zero_grad()
                    loss = module.training_step(batch, i)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(module.parameters(), self.norm)
                    optimizer.step()
                    module.on_train_batch_end(loss, batch, i)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lightning", SimpleNamespace(LightningModule=Module, Trainer=Trainer))
    page = ROOT / "docs" / "training.md"
    (plain,) = (block for block in _blocks(page, "python") if "averaged = AveragedModel" in block)
    (block,) = _blocks(page, "py")
    names = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(plain + block, names)  # noqa: S102
    trained = names["ScoreNet"].from_pretrained("runs/lightning")
    expected = names["training"].averaged
    assert int(expected.n_averaged) == 2
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), expected.module.parameters(), strict=True))


@pytest.mark.slow
def test_the_lines_for_users_of_other_libraries_run(tmp_path, monkeypatch):
    """The first code of each cell in the right columns; a command is only parsed."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "coming-from.md"
    lines = re.findall(r"^\| .* \| `([^`]+)`[^|]* \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    names = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (block,) = _blocks(page, "python")
        exec(block, names)  # noqa: S102
        for line in lines:
            if line.startswith("python -m scorematch "):
                cli._parser().parse_args(shlex.split(line)[3:])
            elif "from_pretrained" not in line and "from_diffusers" not in line:  # these need the Hub and diffusers
                exec(line, names)  # noqa: S102
    assert len(lines) >= 50


def test_the_figure_of_the_page_about_schedules_is_that_of_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(ROOT / "docs" / "schedules.md", "python")
    (figure,) = (block for block in blocks if "steps.svg" in block)
    names = {"schedule": scorematch.NoiseSchedule.geometric(50, 0.01, levels=232), "Curve": Curve, "chart": chart}
    exec(figure, names)  # noqa: S102
    committed = ROOT / "docs" / "images" / "steps.svg"
    assert Path("steps.svg").read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")


def _documented():
    """The names in the API pages."""
    directives = r"^\.\. (?:autoclass|autofunction|py:data):: (\S+)$"
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    return [name for page in pages for name in re.findall(directives, page, re.MULTILINE)]


def _object(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_the_api_pages_have_every_public_name():
    """Those in __all__, and those that pages and examples import."""
    required = {
        f"{module}.{name}"
        for module in MODULES
        for name in getattr(importlib.import_module(module), "__all__", ())
        if name != "__version__"
    }
    lines = r"^from (scorematch[\w.]*) import (\([^)]*\)|[^\n#]*)"
    for path in [*PAGES, *(ROOT / "examples").glob("*.py")]:
        for module, names in re.findall(lines, path.read_text(encoding="utf-8"), re.MULTILINE):
            required |= {f"{module}.{name}" for name in re.findall(r"\w+", names)}
    documented = [_object(name) for name in _documented()]
    assert [name for name in sorted(required) if not any(_object(name) is entry for entry in documented)] == []


def test_every_name_in_the_api_pages_has_a_docstring_and_is_listed_once():
    names = _documented()
    assert len(set(names)) == len(names)
    entries = [_object(name) for name in names]
    undocumented = [entry for entry in entries if isinstance(entry, type | FunctionType) and not entry.__doc__]
    assert undocumented == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_in_the_table_of_contents(page):
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert page.stem in {"README", "index"} or re.search(rf"^{page.stem}$", index, re.MULTILINE)


@pytest.mark.parametrize(
    "module",
    [pytest.param(name, marks=pytest.mark.slow) if name == "scorematch.training.run" else name for name in MODULES],
)
def test_doctests(module):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_at_least_15_doctests_are_found():
    finder = doctest.DocTestFinder()
    attempted = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert attempted >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_pages_compiles(page):
    for block in _blocks(page, "python"):
        compile(block, str(page), "exec")


def test_the_readme_begins_with_commands_for_a_picture_and_the_tests():
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
def test_targets_of_links_exist(page):
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


def test_every_published_checkpoint_is_on_the_page_of_trained_networks():
    page = (ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8")
    for checkpoint in cards.CHECKPOINTS:
        row = next(line for line in page.splitlines() if f"]({checkpoint.address})" in line)
        assert f"`{checkpoint.name}" in row and f"{'x'.join(map(str, checkpoint.shape))}, {checkpoint.data} |" in row
        assert all(fid in row for fid in re.findall(r"FID ([\d.]+\d)", checkpoint.quality))
    assert "CC BY-NC-SA 4.0: **they must not be\nused commercially.**" in page
