"""Runs as they go, as a page for this machine alone, which loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bench.watch.read import Seen, check_run, look_all
from bench.watch.show import COLUMNS, cells
from scoring.errors import UserError

HERE = "127.0.0.1"
REFRESH_S = 3
WIDTH, HEIGHT, MOST_POINTS = 260, 90, 400
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff; }
table { border-collapse: collapse; } th, td { padding: .3em .8em; text-align: left; border-bottom: 1px solid #ddd; }
.running { color: #06c; } .finished { color: #080; } .failed { color: #b00; } .stopped, .waiting { color: #a60; }
.curves { display: flex; flex-wrap: wrap; gap: 1em; } figure { margin: 0; } figcaption { color: #555; font-size: 12px; }
polyline { fill: none; stroke: #06c; stroke-width: 1.5; } svg { border: 1px solid #ddd; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; } figcaption { color: #aaa; } }
"""


def page(seen: Sequence[Seen]) -> str:
    """The page."""
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = "".join(
        f'<tr class="{one.state}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells(one)) + "</tr>"
        for one in seen
    )
    curves = "".join(
        f"<h2>{escape(cells(one)[0])}</h2><div class='curves'>{''.join(_figure(*item) for item in one.curves.items())}"
        "</div>"
        for one in seen
        if one.curves
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_S}">'
        f'<title>mrd-bench watch</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>'
        f"<h1>Runs</h1><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{curves}</body></html>"
    )


def _figure(name: str, points: Iterable[tuple[int, float]]) -> str:
    """A curve with its range in words."""
    finite = [(x, y) for x, y in points if abs(y) < float("inf")]
    if not finite:
        return ""
    thinned = finite[:: max(1, len(finite) // MOST_POINTS)]
    thinned += [finite[-1]] if thinned[-1] != finite[-1] else []
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*thinned, strict=True))
    across, up = (WIDTH - 10) / ((right - left) or 1), (HEIGHT - 10) / ((high - low) or 1)
    line = " ".join(f"{5 + (x - left) * across:.1f},{HEIGHT - 5 - (y - low) * up:.1f}" for x, y in thinned)
    caption = f"{name}: {finite[-1][1]:.4g} at update {finite[-1][0]} (from {low:.4g} to {high:.4g})"
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(caption)}">'
        f'<polyline points="{line}"/></svg><figcaption>{escape(caption)}</figcaption></figure>'
    )


def make_server(folders: Sequence[str | Path], port: int) -> ThreadingHTTPServer:
    """A server of the page, which answers this machine alone.

    Args:
        port: 0 takes any that is free.

    Raises:
        UserError: a folder is no run's, or the port is taken.
    """
    paths = [Path(folder).absolute() for folder in folders]
    for path in paths:
        check_run(path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's page may have its own name point here: it must not read what is answered.
            here = {f"{name}:{self.server.server_port}" for name in (HERE, "localhost")}  # type: ignore[attr-defined]
            if self.headers.get("Host", "") not in here:
                self._answer(403, "only for this machine")
            elif self.path != "/":
                self._answer(404, "there is no such page")
            else:
                self._answer(200, page(look_all(paths)))

        def _answer(self, code: int, text: str) -> None:
            content = text.encode("utf-8", "replace")
            self.send_response(code)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((HERE, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--serve {port}: cannot be listened on ({error}); choose another port, or 0 for any") from None


def serve(folders: Sequence[str | Path], port: int) -> None:
    """Serve the page until it is interrupted."""
    with make_server(folders, port) as server:
        print(f"http://{HERE}:{server.server_port}/ shows {len(folders)} runs; Ctrl-C ends it", flush=True)
        server.serve_forever()
