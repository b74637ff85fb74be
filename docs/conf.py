"""Sphinx: `make docs` makes the pages in build/docs, warnings are errors. Needs the group `docs` of pyproject.toml, and PyTorch."""

import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"  # before Keras is imported

import fastbn.keras
import fastbn.torch

ROOT = Path(__file__).resolve().parents[1]

project = "fastbn"
author = "the fastbn authors"
version = release = fastbn.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
html_theme = "pydata_sphinx_theme"
html_theme_options = {"show_prev_next": False, "navigation_with_keys": False, "show_toc_level": 2}
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"fastbn {version}"
html_show_copyright = False
html_copy_source = False

# Blocks without a language are runs of a command.
highlight_language = "text"
myst_heading_anchors = 4

# An option has two hyphens.
smartquotes = False

# What stands in single backticks of a docstring is a name of the reference.
default_role = "py:obj"
autodoc_typehints = "none"
autodoc_mock_imports = ["olive"]  # of which one base class is all that the pages would need
autosummary_generate = True
# Results say of the model that they have made what their common base says; other bases are not ours.
RESULTS = ("FoldResult", "Deployment", "Reestimation")
numpydoc_show_inherited_class_members = {
    f"{module.__name__}.{name}": name in RESULTS for module in (fastbn, fastbn.torch, fastbn.keras) for name in module.__all__
}
numpydoc_class_members_toctree = False


FILES = ("CHANGELOG", "CONTRIBUTING", "SECURITY")


def read_page(app, name, source):
    """Pages of the files at the top have their text, and links to those files lead to the pages."""
    if name.upper() in FILES:
        path = ROOT / f"{name.upper()}.md"
        app.env.note_dependency(path)
        source[0] = path.read_text(encoding="utf-8").replace("](docs/", "](")
    for file in FILES:
        source[0] = source[0].replace(f"]({file}.md", f"]({file.lower()}.md").replace(f"](../{file}.md", f"]({file.lower()}.md")


def setup(app):
    app.connect("source-read", read_page)
