"""The page of a run's report: report_page.html filled in, with its style sheet and its script in it.

Whatever a prompt, a name or an option holds is escaped: as HTML by the template, and as JSON for the script.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def page(**content: Any) -> str:
    """The whole document. Nothing in `content` (plain data, run_report.py) is taken for HTML; its `data` goes to the script."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style, script = (Markup((FOLDER / f"report_page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    template = environment.from_string((FOLDER / "report_page.html").read_text(encoding="utf-8"))
    return template.render(content | {"data": Markup(embedded(content["data"])), "style": style, "script": script})


def embedded(data: Any) -> str:
    r"""JSON that may stand in a script element: no `<`, `>` or `&`, so no `</script>` and no `<!--`; ASCII, so no U+2028."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
