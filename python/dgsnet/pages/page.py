"""HTML pages that hold everything inside: templates that share page.html's head and style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2


def render(template: Path, **values: Any) -> str:
    """The page that a template makes; values are escaped unless they are Markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template.name).render(values)
