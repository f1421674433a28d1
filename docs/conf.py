"""How the documentation is built: `sphinx-build -W --keep-going -n -b html docs docs/_build`. Nothing is fetched."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import se_fx

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "se_fx"
author = "the se_fx authors"
copyright = author
version = release = se_fx.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "command_help",
    "mathml",
]
exclude_patterns = ["_build"]

# Pages
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "se_fx"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"  # by the browser: no scripts, no fonts, nothing from a network
copybutton_prompt_text = "$ "
copybutton_selector = "div:not(.highlight-output) > div.highlight > pre"

# Reference
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_mock_imports = [
    name for name in ("composer", "lightning") if importlib.util.find_spec(name) is None
]
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "py:obj"  # what is in single backticks links where it is a name, and is code anyway
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:class", r"(lightning|composer)\..*|nn\.Module"),
]  # the last: of constructors

# The inventories hold the names used here, under all names Python knows them by: docs/_inventories/make.py.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", "_inventories/python.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable/", "_inventories/torch.inv"),
}
