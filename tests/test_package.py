"""What is published: the wheel and the sdist, their metadata, and the types that a user's type checker sees."""

import ast
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch

import scorematch
from scorematch.pretrained.cards import CARDS
from tests.helpers import python

ROOT = Path(__file__).parents[1]
CONSUMER = ROOT / "tests" / "typed" / "consumer.py"

# -- Types ------------------------------------------------------------------------------------------------------------


def _public():
    """The names in the API pages, by the modules that the pages name."""
    directives = r"^\.\. (?:autoclass|autofunction|py:data):: (\S+)$"
    for page in (ROOT / "docs" / "api").glob("*.md"):
        yield from re.findall(directives, page.read_text(encoding="utf-8"), re.MULTILINE)


def _used(tree):
    """The names of the package that a module imports and uses, with the modules that they are imported from."""
    aliases = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("scorematch"):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in aliases:
            yield aliases[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield f"{aliases[node.value.id]}.{node.attr}"


def test_the_typed_consumer_uses_every_public_name():
    used = set(_used(ast.parse(CONSUMER.read_text(encoding="utf-8"))))
    assert sorted(set(_public()) - used) == []


@pytest.mark.slow
def test_pyright_finds_no_unknown_type_in_strict_mode():
    pyright = pytest.importorskip("pyright", reason="pyright is not installed: pip install pyright")
    try:  # downloads the type checker the first time
        version = pyright.run("--version", capture_output=True, text=True, timeout=120)
        assert version.returncode == 0, version.stderr
    except Exception as error:  # no node, or no network
        pytest.skip(f"pyright does not run: {error}")
    done = pyright.run("--pythonpath", sys.executable, str(CONSUMER), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout


# -- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The paths of a wheel and an sdist, which is built from the files of this folder."""
    pytest.importorskip("hatchling.build", reason="hatchling is not installed: pip install hatchling")
    folder = tmp_path_factory.mktemp("dist")
    code = (
        "import sys; from hatchling.build import build_sdist, build_wheel\n"
        "print(build_wheel(sys.argv[1])); print(build_sdist(sys.argv[1]))"
    )
    wheel, sdist = python("-c", code, folder, cwd=ROOT).stdout.split()
    return folder / wheel, folder / sdist


def _metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


@pytest.mark.slow
def test_the_wheel_has_all_files_of_the_package_and_is_small(built):
    wheel, _ = built
    assert wheel.stat().st_size < 60e6
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "src" / "scorematch"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert names == {path.relative_to(package.parent).as_posix() for path in files}
    assert "scorematch/py.typed" in names


@pytest.mark.slow
def test_the_sdist_has_the_files_that_tests_and_documentation_need(built):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kept = ["pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"]
    kept += [".pre-commit-config.yaml", ".github/workflows/tests.yml", "packaging/conda-forge/recipe.yaml"]
    assert {*kept, "docs/conf.py", "examples/toy.py", "src/scorematch/py.typed", "tests/conftest.py"} <= names
    assert sdist.stat().st_size < 60e6


@pytest.mark.slow
def test_the_metadata_has_one_version_and_classifiers_of_the_tested_pythons(built):
    metadata = _metadata(built[0])
    assert metadata["Name"] == "scorematch" and metadata["Version"] == scorematch.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    pythons = {value.rpartition(" ")[2] for value in metadata.get_all("Classifier") if "Python :: 3." in value}
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert pythons == set(re.findall(r'"(3\.\d+)"', workflow)) == {f"3.{minor}" for minor in range(10, 15)}
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == scorematch.__version__


def test_the_notice_names_the_weights_that_are_not_under_the_license_of_the_code():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    named = re.findall(r"^ {4}src/scorematch/weights/(\S+)/model\.safetensors$", notice, re.MULTILINE)
    assert named == sorted(card.name for card in CARDS if card.repository is None and card.license != "MIT")


@pytest.mark.slow
def test_the_metadata_has_the_licenses_of_code_and_weights(built):
    metadata = _metadata(built[0])
    recipe = (ROOT / "packaging" / "conda-forge" / "recipe.yaml").read_text(encoding="utf-8")
    assert metadata["License-Expression"] == "MIT AND LicenseRef-CelebA"
    assert f"  license: {metadata['License-Expression']}\n" in recipe
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]


@pytest.mark.slow
def test_the_oldest_dependencies_are_the_same_everywhere(built):
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    recipe = (ROOT / "packaging" / "conda-forge" / "recipe.yaml").read_text(encoding="utf-8")
    conda = {"torch": "pytorch", "huggingface-hub": "huggingface_hub"}
    listed = _metadata(built[0]).get_all("Requires-Dist")
    required = [each for each in listed if "extra ==" not in each]
    assert len(required) == 5
    for name, version in (each.split(">=") for each in required):
        assert f"- {conda.get(name, name)} >={version}\n" in recipe
    required += [each.partition(";")[0] for each in listed if re.search("extra == '(train|arrays)'", each)]
    for name, version in (each.split(">=") for each in required):
        assert re.search(rf"(?:{name}|oldest').*=={re.escape(version)}(?:\.\*)?['\"]", workflow), (name, version)


def test_the_hook_and_the_extra_dev_have_the_same_version_of_ruff():
    """Another version has other rules."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    version = re.search(r"ruff-pre-commit\n +rev: v(\d+)\.(\d+)\.", hooks)
    major, minor = map(int, version.groups())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"ruff>={major}.{minor},<{major}.{minor + 1}"' in project


@pytest.mark.slow
@pytest.mark.parametrize("which", ["wheel", "sdist"])
def test_an_installed_package_samples_offline(which, built, tmp_path):
    """In a new environment, in which pip finds torch and the other dependencies of the tests by a path file."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    scripts = environment / ("Scripts" if sys.platform == "win32" else "bin")
    interpreter = scripts / Path(sys.executable).name
    run = {"capture_output": True, "text": True, "check": True, "timeout": 300, "cwd": tmp_path}
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([interpreter, "-c", code], **run).stdout.strip())
    dependencies = Path(torch.__file__).parents[1]
    (site / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    source = built[which == "sdist"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall", "--target", site]
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *options, source], **run)
    code = (
        "import socket; socket.socket.connect = None  # no network\n"
        "import scorematch, scorematch.sampling\n"
        "net = scorematch.ScoreNet.from_pretrained('mnist')\n"
        "images = scorematch.sampling.ODESampler(net, levels=5).sample(2, generator=0, progress=False)\n"
        "print(scorematch.__file__, scorematch.__version__, *images.shape, images.std().item() > 0.2)"
    )
    printed = subprocess.run([interpreter, "-c", code], **run).stdout.split()
    assert Path(printed[0]).is_relative_to(site)
    assert printed[1:] == [scorematch.__version__, "2", "1", "28", "28", "True"]
