"""Runs the documentation: the code blocks of the pages, and the doctests of the package."""

import argparse
import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import FunctionType
from unittest.mock import patch

import numpy as np
import pytest
import torch

import scorematch
from scorematch import ScoreNet, cli
from scorematch.core.schema import Field
from scorematch.evaluation import METRICS
from scorematch.nets import FAMILIES
from scorematch.pretrained import cards, configuration
from scorematch.restoration import OPERATORS
from scorematch.sampling import SAMPLERS, ODESampler

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their code draws many images, or trains.
SLOW_PAGES = {
    "README",
    "arrays",
    "classes",
    "deploy",
    "evaluation",
    "extending",
    "guidance",
    "incomplete",
    "index",
    "inverse-problems",
    "palette",
    "photographs",
    "recipes",
    "restoration",
    "samplers",
    "scale",
    "schedules",
    "simulations",
    "speed",
    "start",
    "training",
}
SLOW_MODULES = {
    f"scorematch.{name}" for name in ("training.incomplete", "training.recipes", "training.run", "sampling.bulk")
}  # of their doctests
# What the code of a page has in the tests in place of many images or observations.
SMALLER = {
    "evaluation": {
        "levels=(5, 10, 20, 50, 100), n=1000": "levels=(5, 10), n=100",
        "sigma=0.1, progress": "sigma=0.1, observations=30, draws=2, progress",
    },
    "inverse-problems": {
        "ODESampler(net).sample(8, generator=11, progress=False)[1:2]": "torch.rand(1, 3, 64, 64)",
        'restore="auto")  # as': 'levels=3, restore="auto")  # as',
        'restore="auto")\n': 'levels=5, restore="auto")\n',
        "sample(8, observation=Observation(blur": "sample(2, observation=Observation(blur",
        "sample(8, observation=Observation(fourier": "sample(2, observation=Observation(fourier",
    },
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
@pytest.mark.usefixtures("few_levels")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch.func.jvp
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "means", None)  # the metric that a page adds is taken out again
    del METRICS["means"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCOREMATCH_CACHE", str(tmp_path / "cache"))
    names = {"__name__": page.stem}
    with torch.random.fork_rng(), patch.dict(SAMPLERS), patch.dict(OPERATORS):  # a page registers its own
        torch.manual_seed(0)
        code = "".join(_blocks(page, "python"))
        for text, smaller in SMALLER.get(page.stem, {}).items():
            assert code.count(text) == 1, text
            code = code.replace(text, smaller)
        exec(compile(code, str(page), "exec"), names)  # noqa: S102


@pytest.mark.slow
def test_the_page_about_deployment_exports_to_onnx_and_torchscript(tmp_path, monkeypatch):
    """With the loop of the page, which gives the samples of the package."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    page, names = ROOT / "docs" / "deploy.md", {}
    onnx, trace = _blocks(page, "py")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of onnxscript, and of torch.jit, which is deprecated
        export, loop, *_ = _blocks(page, "python")
        for block in (export, onnx, loop, trace):
            exec(compile(block, str(page), "exec"), names)  # noqa: S102
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        names["sample"](names["run"], names["levels"], noise), names["images"], atol=1e-4, rtol=0
    )
    x, sigma = torch.rand(3, 1, 28, 28), torch.tensor([0.02, 0.0, 10.0])
    with torch.no_grad():
        torch.testing.assert_close(names["run"](x, sigma), names["denoiser"](x, sigma), atol=1e-5, rtol=0)


# -- Notebooks ---------------------------------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# The values of the cell "sizes" in the tests.
SMOKE = {
    "digits": {"IMAGES": 128, "SAMPLES": 8},
    "inverse-problems": {"LEVELS": 2, "DRAWS": 5, "TRUTHS": 2},
    "own-data": {"SIZE": 16, "PICTURES": 40, "IMAGES": 64, "SAMPLES": 32},
    "restoration": {"LEVELS": 3, "COUNT": 2},
    "toy": {"STEPS": 5, "POINTS": 50, "STEPS_PER_LEVEL": 2},
}


def _cells(path, kind="code"):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCOREMATCH_CACHE", str(tmp_path / "cache"))
    if path.stem == "digits":  # the tests have no data set: digits of the shipped network take its place
        digits = ODESampler(ScoreNet.from_pretrained("mnist"), levels=3).sample(80, generator=0, progress=False)
        np.savez("mnist.npz", images=(255 * digits[:, 0]).byte().numpy(), labels=np.arange(80) % 10)
    names = {"__name__": path.stem}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for cell in _cells(path):
            exec(compile("".join(cell["source"]), str(path), "exec"), names)  # noqa: S102
            if "sizes" in cell["metadata"].get("tags", ()):
                assert SMOKE[path.stem].keys() <= names.keys()
                names |= SMOKE[path.stem]
    pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_the_outputs_of_one_execution(path):
    cells = _cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert path.stat().st_size < 400_000
    assert [cell["metadata"].get("tags") for cell in cells].index(["sizes"]) == 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_targets_of_links_in_notebooks_exist(path):
    text = "".join("".join(cell["source"]) for cell in _cells(path, "markdown"))
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert links and all((path.parent / link).exists() for link in links)


# -- Pages -------------------------------------------------------------------------------------------------------------


def test_the_family_of_the_page_about_extending_works_in_the_package(tmp_path, monkeypatch):
    """As the file nets/plain.py, with its line in the registry."""
    (block,) = (block for block in _blocks(ROOT / "docs" / "extending.md", "py") if "Family[Plain]" in block)
    names = {"__name__": "scorematch.nets.plain"}
    exec(block, names)  # noqa: S102
    monkeypatch.setitem(FAMILIES, "plain", names["PlainFamily"]())
    monkeypatch.setattr(configuration, "_FAMILY", Field(str, required=True, choices=tuple(FAMILIES)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        schedule = scorematch.NoiseSchedule.geometric(9, 0.01, 5)
        net = ScoreNet._build("plain", 8, schedule, "karras", {"channels": 1, "width": 4})
        x = torch.rand(3, 1, 8, 8)
    net.save_pretrained(tmp_path)
    same = ScoreNet.from_pretrained(tmp_path)
    assert same.config == net.config and same.family.name == "plain"
    with torch.no_grad():
        expected = net.denoise(x, 0.3)
        assert torch.equal(same.denoise(x, 0.3), expected)
        monkeypatch.setattr("scorematch.nets.inference.native_dtype", lambda device: torch.float32)
        torch.testing.assert_close(x + 0.09 * net.inference_copy()(x, 0.3), expected, atol=1e-5, rtol=0)


def _changed(folder, diff):
    """Makes a change of one file of a folder, in the form of a page: parts of a diff, divided by lines of dots."""
    parts = [part.splitlines() for part in diff.split("...\n")]
    parts = [["\n".join(line[1:] for line in part if line[:1] != sign) for sign in "+-"] for part in parts]
    (path,) = (path for path in folder.rglob("*.py") if parts[0][0] in path.read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8")
    for old, new in parts:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_the_option_of_training_of_the_page_about_extending_works_in_the_package(tmp_path):
    """In a copy of the package, as an argument, an option of the command and an entry of config.json."""
    package = Path(scorematch.__file__).parent
    shutil.copytree(package, tmp_path / "scorematch", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    (diff,) = _blocks(ROOT / "docs" / "extending.md", "diff")
    _changed(tmp_path / "scorematch", diff)
    np.savez(tmp_path / "data.npz", images=np.zeros((8, 8, 8), np.uint8))
    code = (
        "import inspect; from scorematch.training import Settings, train\n"
        "assert inspect.signature(train).parameters['floor'].default == 0\n"
        "assert Settings(images=10**6, floor=0.1, lr=1e-3).rate(10**6) == 1e-4\n"
        "assert 'the smallest learning rate, as a fraction of lr' in train.__doc__\n"
    )
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}}
    options |= {"capture_output": True, "text": True, "timeout": 280, "check": False}
    assert subprocess.run([sys.executable, "-c", code], **options).stderr == ""
    command = [sys.executable, "-m", "scorematch", "train", "data.npz", "--out", "run", "--recipe", "tiny"]
    command += ["--images", "8", "--batch-size", "8", "--image-size", "8", "--device", "cpu", "--quiet", "--floor"]
    assert subprocess.run([*command, "0.1"], **options).returncode == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["settings"]["floor"] == 0.1
    again = subprocess.run([*command, "0.2"], **options)
    assert again.returncode == 2 and "floor" in again.stderr
    refused = subprocess.run([*command, "2"], **options)
    assert refused.returncode == 2 and "--floor" in refused.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("few_levels")
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
            if line.startswith("scorematch "):
                cli._parsers("scorematch")[0].parse_args(shlex.split(line)[1:])
            elif "from_pretrained" not in line and "from_diffusers" not in line:  # these need the Hub and diffusers
                exec(line, names)  # noqa: S102
    assert len(lines) >= 50


@pytest.mark.parametrize("picture", ["technique1", "technique2", "technique4"])
def test_figures_of_the_page_about_schedules_are_those_of_its_code(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(ROOT / "docs" / "schedules.md", "python")
    imports = next(block for block in blocks if "from scorematch.core.charts" in block).partition("data =")[0]
    (figure,) = (block for block in blocks if f"{picture}.svg" in block)
    names = {}
    exec(imports + "schedule = NoiseSchedule.geometric(50, 0.01, levels=232)\n" + figure, names)  # noqa: S102
    committed = ROOT / "docs" / "images" / f"{picture}.svg"
    assert Path(f"{picture}.svg").read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")


def _documented():
    """The directives of the API pages with their names; a module and its function may have the same name."""
    directives = r"^\.\. (autoclass|autofunction|automodule|py:data):: (\S+)$"
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    return [found for page in pages for found in re.findall(directives, page, re.MULTILINE)]


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
    documented = [_object(name) for _, name in _documented()]
    assert [name for name in sorted(required) if not any(_object(name) is entry for entry in documented)] == []


def test_every_name_in_the_api_pages_has_a_docstring_and_is_listed_once():
    found = _documented()
    assert len(set(found)) == len(found)
    entries = [_object(name) for _, name in found]
    undocumented = [entry for entry in entries if isinstance(entry, type | FunctionType) and not entry.__doc__]
    assert undocumented == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_in_the_table_of_contents(page):
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert page.stem in {"README", "index"} or re.search(rf"^{page.stem}$", index, re.MULTILINE)


@pytest.mark.parametrize(
    "module", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_MODULES else name for name in MODULES]
)
def test_examples_of_docstrings_run(module):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_every_example_of_a_docstring_is_found():
    for name in MODULES:
        module = importlib.import_module(name)
        found = sum(len(test.examples) for test in doctest.DocTestFinder().find(module))
        assert found == inspect.getsource(module).count(">>> "), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_pages_compiles(page):
    for block in _blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_pages_are_those_of_the_parsers(page):
    """A line of a block is parsed; a command in a sentence, or with a word such as FILE, must have these options."""
    parser, text = cli._parsers("scorematch")[0], page.read_text(encoding="utf-8").replace("\\\n", " ")
    (commands,) = (each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    lines = re.findall(r"^[ $]*(?:.* -m )?scorematch (\w.*?)(?: (?:[#|>;]|&&).*)?$", text, re.MULTILINE)
    for line in [*lines, *re.findall(r"`(?:scorematch )?((?:train|sample|restore|evaluate|tune) [^`]+)`", text)]:
        words = shlex.split(line)
        if line in lines and not any(word.isupper() for word in words):
            parser.parse_args(words)
        options = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
        assert options <= set(commands[words[0]]._option_string_actions), line


def test_the_readme_begins_with_commands_for_a_picture_and_the_tests():
    commands = _blocks(ROOT / "README.md", "bash")[:2]
    assert commands == [
        'pip install ".[images]" && '
        "python -m scorematch sample mnist-classes digits.png --class cycle --guidance 1.5\n",
        'pip install ".[test]" && python -m pytest\n',
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_targets_of_links_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_page_of_trained_networks_has_every_card():
    """The build puts the parts that docs/networks.py makes in place of their marks."""
    parts = runpy.run_path(str(ROOT / "docs" / "networks.py"))["PARTS"]
    for page, expected in [("pretrained", ["table", "grids"]), ("networks", ["cards"])]:
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert re.findall(r"^<!-- made: (\w+) -->$", text, re.MULTILINE) == expected
    _, _, *rows = parts["table"]().splitlines()
    for card, row in zip(cards.CARDS, rows, strict=True):
        cells = row.strip("|").split("|")
        assert len(cells) == 6 and all(text in row for text in (card.license, card.data, f"{card.parameters:,}"))
        assert f"{card.levels}, {card.sigmas[0]:g} -> {card.sigmas[1]:g}" in row
        assert "x".join(map(str, card.shape)) in row and (card.revision or "")[:12] in row
        assert f"`{card.name or card.repository}`" in row
    shipped = [card.name for card in cards.CARDS if card.repository is None]
    assert sorted(shipped) == sorted(folder.name for folder in cards.SHIPPED.iterdir() if folder.is_dir())
    for name in shipped:
        assert f"### {name}\n" in parts["grids"]()
        assert f"../src/scorematch/weights/{name}/README.md" in parts["cards"]()


@pytest.mark.parametrize("name", [card.name for card in cards.CARDS if card.repository is None])
def test_every_network_that_ships_has_a_picture(name):
    """Made, for example, by ``sample NAME docs/images/networks/NAME.png -n 64 --columns 16``."""
    assert (ROOT / "docs" / "images" / "networks" / f"{name}.png").exists()


def test_every_published_checkpoint_is_on_the_page_of_trained_networks():
    page = (ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8")
    for checkpoint in cards.CHECKPOINTS:
        row = next(line for line in page.splitlines() if f"]({checkpoint.address})" in line)
        assert f"`{checkpoint.name}" in row and f"{'x'.join(map(str, checkpoint.shape))}, {checkpoint.data} |" in row
        assert all(fid in row for fid in re.findall(r"FID ([\d.]+\d)", checkpoint.quality))
    assert "CC BY-NC-SA 4.0: **they must not be\nused commercially.**" in page


def test_the_index_of_words_has_the_words_that_people_use():
    text = (ROOT / "docs" / "words.md").read_text(encoding="utf-8").lower()
    words = ("resume", "fine-tune", "uncertainty", "mri", "scientific", "epochs", "ddim", "inpainting", "lora")
    assert [word for word in words if word not in text] == []
