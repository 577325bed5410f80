"""The playground: a page of one file in which a person makes blanks in a text and watches the server fill them."""

import base64
import hashlib
from importlib import resources
from string import Template

from a3_hf.visualization.tokens import confidence_colour


def playground_page() -> str:
    """Returns the HTML of the playground, which asks the server that it came from and nothing else.

    It has the looks of the replay page. Its content security policy allows only its own script and style.
    """
    style = _file("a3_hf.visualization", "page.css") + _file(__package__, "playground", "playground.css")
    script = _file(__package__, "playground", "playground.js")
    return Template(_file(__package__, "playground", "playground.html")).substitute(
        colours=" ".join(confidence_colour(percent / 100) for percent in range(101)),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
    )


def _file(package: str, *path: str) -> str:
    return resources.files(package).joinpath(*path).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression of a content security policy that allows this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
