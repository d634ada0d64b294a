"""The structure of the package: its public names, and imports that point one way."""

import ast
import functools
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import scorematch
from scorematch.nets import FAMILIES
from scorematch.nets.precondition import ROWS
from tests.helpers import python

PACKAGE = Path(scorematch.__file__).parent

# A module or package may import only from earlier layers of this list; a package may also import from itself.
LAYERS = [
    {"core"},
    {"data", "noise"},
    {"nets", "restoration"},
    {"guidance", "likelihood", "loss", "sampling"},
    {"pretrained"},
    {"score"},
    {"__init__"},
    {"evaluation", "training"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
MOST_PARTS, MOST_IMPORTS = 20, 100  # of parts from each other


def _part(path):
    """The top-level module or package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["scorematch", *(parts if len(parts) == 1 else [part for part in parts if part != "__init__"])])


@functools.cache
def _nodes_of(text):
    return tuple(ast.walk(ast.parse(text)))


def _nodes(path):
    """The nodes of the syntax tree of a file."""
    return _nodes_of(path.read_text(encoding="utf-8"))


def _imports(path):
    """The names of the modules that a file imports, at module level, in a function or for types only."""
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            folder = PACKAGE.joinpath(*node.module.split(".")[1:])
            for alias in node.names:  # a name is a submodule, or a name in the module
                inner = node.module.split(".")[0] == "scorematch" and (
                    (folder / alias.name).is_dir() or (folder / f"{alias.name}.py").is_file()
                )
                root = "scorematch.__init__" if node.module == "scorematch" else node.module
                yield f"{node.module}.{alias.name}" if inner else root


def _upward():
    layer = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    for path in PACKAGE.rglob("*.py"):
        part = _part(path)
        assert part in layer, f"{part} has no layer: add it to the list"
        for name in _imports(path):
            if not name.startswith("scorematch"):
                continue
            target = name.split(".")[1]
            inside = target == part and (PACKAGE / part).is_dir()
            if layer[target] >= layer[part] and not inside:
                yield f"{path.relative_to(PACKAGE)} imports {name}"


def test_imports_point_one_way():
    assert list(_upward()) == []


def test_the_parts_are_few_and_import_few_others():
    between = {
        (_part(path), name.split(".")[1])
        for path in PACKAGE.rglob("*.py")
        for name in _imports(path)
        if name.startswith("scorematch") and name.split(".")[1] != _part(path)
    }
    assert len({part for pair in between for part in pair}) <= MOST_PARTS
    assert len(between) <= MOST_IMPORTS


def test_the_check_of_import_directions_can_fail(tmp_path, monkeypatch):
    for name in ("noise", "data"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "score.py").write_text("from scorematch import noise\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert list(_upward()) == []
    (tmp_path / "noise.py").write_text("def f():\n    from scorematch import score\n")
    (tmp_path / "data.py").write_text("import scorematch.noise\n")
    assert sorted(_upward()) == ["data.py imports scorematch.noise", "noise.py imports scorematch.score"]


def _circle():
    """Modules with circular imports, at module level or in functions; None if there are none."""
    graph = {_name(path): {name for name in _imports(path) if name != _name(path)} for path in PACKAGE.rglob("*.py")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_the_page_about_contributing_names_every_part():
    text = Path(__file__).parents[1].joinpath("CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [part for part in set.union(*LAYERS) - {"__init__", "__main__"} if f"`{part}`" not in text] == []


def test_there_are_no_circular_imports():
    assert _circle() is None


def test_the_check_of_circular_imports_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "__init__.py").write_text("from scorematch.nets import unet\n")
    (tmp_path / "nets" / "unet.py").write_text("from scorematch.nets import layers\n")
    (tmp_path / "nets" / "layers.py").write_text("import torch\n")
    assert _circle() is None
    (tmp_path / "nets" / "layers.py").write_text("def f():\n    from scorematch.nets.unet import g\n")
    assert set(_circle()) == {"scorematch.nets.unet", "scorematch.nets.layers"}


def _compared(nodes, subject, names):
    """Comparisons of something whose text matches ``subject`` with one of the names."""
    for node in nodes:
        if isinstance(node, ast.Compare):
            values = {word.value for word in ast.walk(node) if isinstance(word, ast.Constant)}
            if values & names and re.search(subject, text := ast.unparse(node)):
                yield text


def _asks_for_a_family(nodes):
    """Comparisons with the name of a family, and isinstance calls with the class of its networks."""
    classes = {family.network.__name__ for family in FAMILIES.values()}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            words = {word.id for word in ast.walk(node) if isinstance(word, ast.Name)}
            yield from [ast.unparse(node)] if words & classes else []
    yield from _compared(nodes, "family", FAMILIES.keys())


def _asks_for_a_row(nodes):
    """Comparisons with the name of a row of the preconditioning table."""
    yield from _compared(nodes, r"\brows?\b|precondition", ROWS.keys())


def test_no_module_outside_nets_compares_families():
    found = {path: list(_asks_for_a_family(_nodes(path))) for path in PACKAGE.rglob("*.py") if _part(path) != "nets"}
    assert {path.name: lines for path, lines in found.items() if lines} == {}


def test_only_the_preconditioning_table_compares_its_rows():
    found = {path: list(_asks_for_a_row(_nodes(path))) for path in PACKAGE.rglob("*.py")}
    found.pop(PACKAGE / "nets" / "precondition.py")
    assert {path.name: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("check", "line"),
    [
        (_asks_for_a_family, "isinstance(net.backbone, UNet)"),
        (_asks_for_a_family, "config['family'] == 'ncsn'"),
        (_asks_for_a_family, "self.family.name in ('unet', 'ncsnv2')"),
        (_asks_for_a_row, "net.precondition != 'karras'"),
        (_asks_for_a_row, "row in ('vp', 'subvp')"),
    ],
)
def test_the_checks_of_comparisons_can_fail(check, line):
    assert list(check(_nodes_of(f"if {line}:\n    pass"))) == [line]


def test_no_module_has_an_unspecific_name_such_as_utils():
    names = {"utils", "util", "helpers", "common", "misc"}
    assert [path for path in PACKAGE.rglob("*.py") if path.stem.strip("_") in names] == []


def test_the_public_names():
    names = {"AnnealedLangevinSampler", "NoiseSchedule", "ScoreNet", "__version__", "dsm_loss"}
    assert set(scorematch.__all__) == names
    assert all(hasattr(scorematch, name) for name in names)


def test_no_public_function_has_a_keyword_catch_all():
    """The signature of a function with ``with_options`` has the declared options instead."""
    for path in PACKAGE.rglob("*.py"):
        for node in _nodes(path):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                declared = any(ast.unparse(each).startswith("with_options(") for each in node.decorator_list)
                assert node.args.kwarg is None or declared, f"{path.name}: {node.name}"


def test_import_draws_no_random_numbers_and_loads_only_what_is_used():
    """Optional libraries are not imported, and submodules only at the first access to an attribute.

    Without the optional libraries, all parts of the package can be imported.
    """
    public = (
        "core",
        "data",
        "evaluation",
        "guidance",
        "likelihood",
        "loss",
        "nets",
        "noise",
        "pretrained",
        "restoration",
        "sampling",
        "score",
        "training",
    )
    code = (
        "import torch; state = torch.get_rng_state()\n"
        "import sys, scorematch\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "assert 'scorematch.likelihood' not in sys.modules\n"
        f"for name in {public}:\n"
        "    assert getattr(scorematch, name).__name__ == 'scorematch.' + name\n"
        "    assert name == 'core' or scorematch.__dict__[name].__all__\n"
        "optional = 'accelerate', 'gradio', 'matplotlib', 'PIL', 'scipy', 'torch_fidelity', 'torchvision', 'yaml'\n"
        "assert not {'huggingface_hub', *optional} & set(sys.modules)\n"
        "sys.modules.update(dict.fromkeys(optional))\n"
        "import scorematch.training, scorematch.evaluation, scorematch.cli\n"
    )
    python("-c", code)


def test_an_unknown_attribute_of_the_package_raises():
    with pytest.raises(AttributeError, match="module 'scorematch' has no attribute 'nonsense'"):
        scorematch.nonsense  # noqa: B018
