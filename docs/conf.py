"""The documentation as a site, made by `nox -s docs`.

Pages are the Markdown files of this folder, whose links lead somewhere on a forge, too. A link to a file outside of it, such as a
test, becomes a copy of that file in the site; MyST does so itself. What is left to do here is the README, which is the front page
and lies a folder above.
"""

import re
from pathlib import Path

from kvq import __version__

ROOT = Path(__file__).parents[1]

project = "kvq"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"kvq {release}"
html_copy_source = False  # the sources are in the repository
html_show_copyright = False

myst_heading_anchors = 3  # links to headings as forges make them: #in-a-model-of-your-own

autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "__version__"}
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # Keras' own are Markdown
default_role = "code"  # docstrings are written for readers of the source: `name` is code
napoleon_custom_sections = [("Call arguments", "params_style")]

linkcheck_timeout = 15
linkcheck_retries = 2


def links_of_the_readme(app, path, parent, content) -> None:
    """Lets the README's links start from this folder. Those to folders, which a site cannot show, become plain text."""

    def moved(match: re.Match) -> str:
        text, target = match.groups()
        if target.startswith(("https://", "#")):
            return match[0]
        if (ROOT / target).is_dir():
            return text
        return f"[{text}]({target.removeprefix('docs/') if target.startswith('docs/') else '../' + target})"

    content[0] = re.sub(r"\[([^]\n]*)\]\(([^)\s]+)\)", moved, content[0])


def links_to_the_readme(app, docname, content) -> None:
    """Lets them lead to the front page."""
    content[0] = content[0].replace("](../README.md", "](index.md")


def plain_bars(app, what, name, obj, options, lines) -> None:
    """Keeps |z| of a docstring a norm: to reStructuredText it is a name to be replaced."""
    lines[:] = [re.sub(r"(`[^`]*`)|\|", lambda match: match[1] or r"\|", line) for line in lines]


def setup(app) -> None:
    app.connect("source-read", links_to_the_readme)
    app.connect("include-read", links_of_the_readme)
    app.connect("autodoc-process-docstring", plain_bars)
