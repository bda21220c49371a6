"""What the pages that kvq writes look like, all of them."""

import importlib.resources


def style(own: str) -> str:
    """The whole style sheet of a page with rules of its own, which come last."""
    return (importlib.resources.files("kvq") / "pages.css").read_text("utf-8") + own
