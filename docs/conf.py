"""The configuration of the site: ``python -m sphinx -W --keep-going docs build/site``, with the extra ``docs``."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import latex2mathml.converter
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.writers.html5 import HTML5Translator

import scorematch
from scorematch.cli import parsers

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

import networks  # noqa: E402

project = "scorematch"
author = "The scorematch developers"
copyright = f"2026, {author}"  # noqa: A001, the name that Sphinx reads
version = release = scorematch.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs, some of which take half an hour
nb_merge_streams = True
highlight_language = "text"  # of indented blocks, which are commands and formulas

# -- API ---------------------------------------------------------------------------------------------------------------

autosummary_generate = False  # the tables of docs/api link to the same page
suppress_warnings = ["autosummary.import_cycle"]  # full names after automodule are what is meant
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# Docstrings divide long lists of arguments by such lines. Each becomes a list of its own.
GROUPS = ["Rarely needed", "Not in diffusers"]
napoleon_custom_sections = [(group, "params_style") for group in GROUPS]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# The few objects of other projects that signatures name, as lists in the repository: building needs no network.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.txt"),
    "numpy": ("https://numpy.org/doc/stable", "inventories/numpy.txt"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.txt"),
}


def prepare_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Makes a section of each group of arguments and a paragraph of each reference, and keeps colons of properties."""
    if what == "property":
        lines[:0] = ["..", ""]  # an empty comment: napoleon takes what is before a colon in the first line for a type
    group = re.compile(rf"    ({'|'.join(GROUPS)}):$")
    for i in range(len(lines) - 1, -1, -1):
        if match := group.match(lines[i]):
            lines[i : i + 2] = [f"{match[1]}:"]
    if "References:" in lines:
        for i in range(len(lines) - 1, lines.index("References:") + 1, -1):
            if lines[i].startswith("    ") and lines[i - 1].startswith("    ") and lines[i - 1].endswith("."):
                lines.insert(i, "")


def find_public_name(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """Links a class that a signature names by its module, or without one, to its public name."""
    if node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    last = node["reftarget"].rpartition(".")[2]
    found = {name for name in objects if name.rpartition(".")[2] == last and objects[name].objtype == "class"}
    found = {name for name in found if not objects[name].aliased}
    if len(found) != 1:
        return None
    entry = objects[found.pop()]
    uri = f"{app.builder.get_relative_uri(node['refdoc'], entry.docname)}#{entry.node_id}"
    return nodes.reference("", "", text, internal=True, refuri=uri)


# -- Parts of pages that are made from the cards of networks and from the parsers of the commands ----------------------

_PART = re.compile(r"^<!-- made: (\w+) -->$", re.MULTILINE)


def commands() -> str:
    """The help of every command."""
    with mock.patch.dict(os.environ, {"COLUMNS": "100"}):
        return "\n\n".join(f"## {name}\n\n```\n{each.format_help()}```" for name, each in parsers("scorematch").items())


def insert_parts(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts the parts of docs/networks.py and the help of the commands in place of their marks."""
    source[0] = _PART.sub(lambda mark: {**networks.PARTS, "commands": commands}[mark[1]](), source[0])


# -- Files of the repository that pages link to ------------------------------------------------------------------------

# These are included in pages.
PAGES = {
    "CHANGELOG.md": "changelog.html",
    "CONTRIBUTING.md": "contributing.html",
    **{f"src/scorematch/weights/{card.name}/README.md": f"networks.html#{card.name}" for card in networks.shipped()},
}


class SourceLinks(SphinxTransform):
    """Links to files outside ``docs`` lead to a page of the site that shows the file."""

    default_priority = 500

    def apply(self, **options: Any) -> None:
        """Replaces the references that MyST makes of such links."""
        here = self.env.docname
        for node in list(self.document.findall(addnodes.pending_xref)):
            if node["reftarget"].startswith(str(ROOT)) and node.get("refdomain") == "doc":
                self.replace(node, f"{Path(node['reftarget']).relative_to(ROOT).as_posix()}.md")
        for node in list(self.document.findall(addnodes.download_reference)):
            path = (DOCS / here).parent.joinpath(node["reftarget"]).resolve()
            if path.is_file() and not path.is_relative_to(DOCS):
                self.replace(node, path.relative_to(ROOT).as_posix())

    def replace(self, node: nodes.Element, name: str) -> None:
        """Replaces a reference to the file of this name, relative to the root of the repository."""
        here = self.env.docname
        if name not in PAGES:
            self.env.metadata[here].setdefault("sources", set()).add(name)
        uri = "../" * here.count("/") + PAGES.get(name, f"source/{name}.html")
        node.replace_self(nodes.reference("", "", *node.children, refuri=uri))


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The pages that show files of the repository."""
    names = set().union(*(page.get("sources", ()) for page in app.env.metadata.values()))
    for name in sorted(names):
        text = (ROOT / name).read_text(encoding="utf-8")
        language = "python" if name.endswith(".py") else "text"
        code = app.builder.highlighter.highlight_block(text, language, linenos=False)
        yield f"source/{name}", {"title": name, "body": f"<h1>{name}</h1>\n{code}"}, "page.html"


def name_pages(app: Sphinx, tree: nodes.document, page: str) -> None:
    """Links to pages show the titles of the pages, where the text is the name of the file."""
    titles = {f"{name}.md": title.astext().partition(":")[0] for name, title in app.env.titles.items()}
    for link in tree.findall(nodes.reference):
        if link.astext() in titles:
            link[:] = [nodes.Text(titles[link.astext()])]


# -- Formulas, as MathML, which browsers show without JavaScript and offline -------------------------------------------


def _mathml(writer: HTML5Translator, node: nodes.Element, display: str) -> None:
    """Writes a formula; a display of several lines is aligned at its ampersands."""
    latex = node.astext()
    if r"\\" in latex or "&" in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    formula = latex2mathml.converter.convert(latex, display=display)
    writer.body.append(formula if display == "inline" else f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


def write_inline(writer: HTML5Translator, node: nodes.Element) -> None:
    """Writes a formula within a line."""
    _mathml(writer, node, "inline")


def write_display(writer: HTML5Translator, node: nodes.Element) -> None:
    """Writes a formula on lines of its own."""
    _mathml(writer, node, "block")


# -- HTML --------------------------------------------------------------------------------------------------------------

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "scorematch"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
html_show_sphinx = False
html_math_renderer = "mathml"


def _summary(env: BuildEnvironment, page: str) -> str:
    """The first paragraph of a page, on one line."""
    return next(iter(env.get_doctree(page).findall(nodes.paragraph))).astext().replace("\n", " ")


def write_llms_txt(app: Sphinx, error: Exception | None) -> None:
    """Writes llms.txt (https://llmstxt.org): the title, the address and the first paragraph of each page.

    The address is that of the source in Markdown, except for pages whose text is made by directives or from cards.
    """
    if error or app.builder.name != "html":
        return
    env, parts = app.env, []
    for toctree in env.get_doctree("index").findall(addnodes.toctree):
        parts.append(f"\n## {toctree['caption']}\n")
        pages = [page for _, top in toctree["entries"] for page in (top, *env.toctree_includes.get(top, []))]
        for page in pages:
            source = Path(env.doc2path(page))
            text = source.read_text(encoding="utf-8")
            plain = source.suffix == ".md" and "```{" not in text and not _PART.search(text)
            address = f"_sources/{page}.md.txt" if plain else f"{page}.html"
            parts.append(f"- [{env.titles[page].astext()}]({html_baseurl}{address}): {_summary(env, page)}")
    text = "\n".join([f"# {project}\n", f"> {_summary(env, 'index')}", *parts, ""])
    (Path(app.outdir) / "llms.txt").write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Registers the functions above."""
    app.connect("source-read", insert_parts)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon, which has 500
    app.connect("missing-reference", find_public_name)
    app.connect("doctree-resolved", name_pages)
    app.connect("html-collect-pages", source_pages)
    app.connect("build-finished", write_llms_txt)
    app.add_transform(SourceLinks)
    app.add_html_math_renderer("mathml", (write_inline, None), (write_display, None))
