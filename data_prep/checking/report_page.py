"""The page of check_shards.py's report: report_page.html filled in; whatever a file name or a caption holds is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_suffix(".html")


def page(**content: Any) -> str:
    """The whole document. `content` is plain data (report.py): nothing in it is taken for HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(content)
