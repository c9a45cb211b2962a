"""What the pages of all reports share: the templates' environment, style and scripts.

Texts are user data: HTML templates escape every one of them, and the markdown filter escapes cells of tables.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from s2quant.report.format import MISSING


def environment() -> Environment:
    """Set templates up: HTML ones escape everything, filters write figures and markdown.

    Returns:
        The environment.
    """
    env = Environment(
        loader=PackageLoader("s2quant.report", "templates"),
        autoescape=lambda name: name is None or name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"md": _markdown, "minus": _minus}
    env.globals["MISSING"] = MISSING
    return env


def assets(env: Environment, script: str) -> dict[str, Any]:
    """Load the style sheet and a script of ours (not user data), and the script's hash for the policy.

    Args:
        env: From `environment`.
        script: File name of the script.

    Returns:
        What a page needs to hold them.
    """
    loader = env.loader
    assert loader is not None
    css, js = (loader.get_source(env, name)[0] for name in ("page.css", script))
    digest = base64.b64encode(hashlib.sha256(js.encode("utf-8")).digest()).decode("ascii")
    return {"css": Markup(css), "js": Markup(js), "js_hash": digest}


def _markdown(text: str | None) -> str:
    """Escape a text for a cell of a markdown table."""
    if text is None:
        return MISSING
    plain = re.sub(r"([\\`*_<>|~#!])", r"\\\1", " ".join(text.split()))
    return re.sub(r"\](?=[(\[:])", r"\\]", plain)


def _minus(text: str) -> str:
    """Set a typographic minus before figures."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\u2212", text)
