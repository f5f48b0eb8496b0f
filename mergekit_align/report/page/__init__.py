"""A report as one self-contained page, which loads nothing and says so to the browser.

All that others wrote is escaped by the template engine, and made visible first; the page's policy
(CSP) lets no script run but its own, whose hash it gives.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

import mergekit_align
from mergekit_align.report.contents import Section
from mergekit_align.report.figures import svg
from mergekit_align.report.text import visible


def html(sections: Sequence[Section], *, title: str, watched: int | None = None) -> str:
    """The page.

    Args:
        watched: seconds after which the page reloads itself.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        plain = isinstance(value, str) and not isinstance(value, Markup)
        return visible(value) if plain else value

    here = files(__package__)
    environment = Environment(
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    script = (here / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    drawn = [
        {**section._asdict(), "drawn": [(each, Markup(svg(each))) for each in section.figures]}
        for section in sections
    ]
    return template.render(
        sections=drawn,
        title=title,
        version=mergekit_align.__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        watched=watched,
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )
