"""A page that needs no network: one HTML file with its style, its script, and the data that the script shows."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench.report.style import STYLE_SHEET

HERE = Path(__file__).parent
# Letters with which the JSON could end its script element, begin another, or end a line.
_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def document(title: str, body: str, data: Any, folder: Path, name: str) -> str:
    """The whole document.

    The script finds the data in the element "data", and what scripts have in common (`page.js`) above itself.

    Args:
        title: plain text.
        body: HTML.
        data: for JSON; may have any texts.
        folder, name: of the script NAME.js and the style sheet NAME.css.
    """
    script = _joined((HERE / "page.js", folder / f"{name}.js"))
    style = STYLE_SHEET + _joined((HERE / "page.css", folder / f"{name}.css"))
    # Texts of samples are shown as text. Should one ever get further, the policy lets nothing run but this script, and
    # nothing be loaded.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'{title_element(title)}<link rel="icon" href="data:,"><style>{style}</style></head>'
        f"<body>{body}"
        f'<script type="application/json" id="data">{_json(data)}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def title_element(title: str) -> str:
    """By that a page is told from somebody else's."""
    return f"<title>{escape(title)}</title>"


def _joined(paths: Sequence[Path]) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in paths)


def _json(value: Any) -> str:
    """JSON that can stand in a script element, whatever its texts say."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
