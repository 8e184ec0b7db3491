"""Texts made from templates: HTML pages, which share page.html's head and style, and Markdown."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import jinja2


def render(template: Path, **values: Any) -> str:
    """The text that a template makes; in HTML values are escaped unless they are Markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=template.suffix == ".html",
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["plain"] = plain
    return environment.get_template(template.name).render(values)


def plain(text: str) -> str:
    """A stranger's text as Markdown that shows it in one line: neither markup nor HTML nor a cell's end.

    >>> print(plain("a|b <i>\\n# c"))
    a\\|b &lt;i&gt; # c
    """
    return re.sub(r"([\\`|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def code(text: str) -> str:
    """The same as code.

    >>> print(code("a`b"))
    `a'b`
    """
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"
