"""The plan of the house: its public face, and imports that point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import scorematch

PACKAGE = Path(scorematch.__file__).parent

# A room may import from the floors below its own, and from the same package folder.
FLOORS = [
    {"noise", "observe", "nets", "images", "hub"},
    {"precondition", "layout", "cards", "palette"},
    {"pretrained"},
    {"loss", "sampling", "score"},
    {"__init__", "convert", "likelihood"},
    {"__main__"},
]
# Packages, whose files import one another.
DOORS = {"nets": {"nets"}, "sampling": {"sampling"}}


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "scorematch":  # the names of the face, or submodules
                for alias in node.names:
                    submodule = (PACKAGE / alias.name).is_dir() or (PACKAGE / f"{alias.name}.py").is_file()
                    yield f"scorematch.{alias.name}" if submodule else "scorematch.__init__"
            else:
                yield node.module


def _upward():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    for path in PACKAGE.rglob("*.py"):
        room = _room(path)
        assert room in floor, f"{room} has no floor: add it to the plan"
        for name in _imports(path):
            if not name.startswith("scorematch"):
                continue
            target = name.split(".")[1]
            if floor[target] >= floor[room] and target not in DOORS.get(room, set()):
                yield f"{path.relative_to(PACKAGE)} imports {name}"


def test_no_import_points_upward():
    assert list(_upward()) == []


def test_the_walk_finds_an_upward_import(tmp_path, monkeypatch):
    for name in ("noise", "images"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "score.py").write_text("from scorematch import noise\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert list(_upward()) == []
    (tmp_path / "noise.py").write_text("def f():\n    from scorematch import score\n")
    (tmp_path / "images.py").write_text("import scorematch.noise\n")
    assert sorted(_upward()) == ["images.py imports scorematch.noise", "noise.py imports scorematch.score"]


def test_the_public_face():
    names = {"AnnealedLangevinSampler", "NoiseSchedule", "ScoreNet", "__version__", "dsm_loss"}
    assert set(scorematch.__all__) == names
    assert all(hasattr(scorematch, name) for name in names)


def test_nothing_public_takes_keywords_it_does_not_name():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert node.args.kwarg is None, f"{path.name}: {node.name}"


def test_import_loads_no_optional_library_and_leaves_the_seed_alone():
    code = (
        "import torch; state = torch.get_rng_state()\n"
        "import sys, scorematch, scorematch.images, scorematch.sampling\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "assert not {'PIL', 'matplotlib', 'scipy', 'torchvision', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
