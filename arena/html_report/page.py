"""The HTML file: a fixed page with its style and scripts, and the content as JSON, which is data and never code.

Its Content-Security-Policy allows these scripts by their digests, nothing else, and no request at all. Vega's
expressions are interpreted, so that not even they need `eval`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from functools import lru_cache
from pathlib import Path
from string import Template
from typing import Any

from arena.html_report.charts import Chart
from arena.storage.files import write_text

HERE = Path(__file__).parent
# what HTML or old JavaScript might read as more than a text, and halves of surrogate pairs, which UTF-8 cannot hold
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def as_json(value: Any) -> str:
    """Content as JSON that may stand in an HTML script; numbers that are not finite are null."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: Any) -> Any:
    if isinstance(value, Chart):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@lru_cache(maxsize=1)  # takes seconds
def _vega() -> str:
    """The JavaScript that draws charts."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def write_page(path: Path, title: str, content: dict[str, Any]) -> None:
    """Writes the page, whole or not at all."""
    style, script = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    scripts = [_vega(), script]
    policy = "; ".join(
        [
            "default-src 'none'", f"script-src {' '.join(map(_digest, scripts))}", f"style-src {_digest(style)}",
            "base-uri 'none'", "form-action 'none'",
        ]
    )  # fmt: skip
    parts = {"policy": policy, "title": html.escape(title), "style": style, "content": as_json(content)}
    parts |= {"vega": scripts[0], "script": script}
    write_text(path, Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(parts))


def _digest(text: str) -> str:
    """The source expression of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
