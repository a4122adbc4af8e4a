"""The page over loopback while runs go on: drawn anew when their records have changed, for a browser that looks again.

    with Live([folder], port) as live: ...      live.address is where it is served

Only this machine can reach it, and only under the names of this machine: a page of another site that points a name of
its own here is refused. Cost: a thread that sleeps; a page, some ms, when somebody looks and something is new.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from spryfl import page
from spryfl.report import Foretold, Run, is_comparison, read_comparison

HOST = "127.0.0.1"
EVERY = 2.0  # seconds until a page looks again
_FILES = ("records.jsonl", "run.json", "compare.toml")
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_NOT_YET = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">'
    "<title>spryfl report</title><p>The run has not begun yet, or is just being written. This page looks again.</p>"
)


class Live:
    """A page that is served from `with` on. The port is taken at once, so that a refusal comes before a run.

    Args:
        folders: of runs, or of one comparison; they need not be there yet.
        port: of this machine; 0 for any that is free.
        kept: where the page will lie in the end, for its readers.

    Raises:
        ValueError: the port is taken, or may not be used.
    """

    def __init__(self, folders: Sequence[Path], port: int = 0, kept: str = "", every: float = EVERY) -> None:
        self._folders, self._kept, self._every = list(folders), kept, every
        self.foretold: Mapping[str, Foretold] = {}
        self._drawn: tuple[str, str] = ("", "")  # (version, page)
        self._looked = 0.0  # when somebody looked last
        self._last = threading.Event()  # somebody has the page of the end
        self._lock = threading.Lock()
        self._server = _bound(port, self)
        self.address = f"http://{HOST}:{self._server.server_address[1]}/"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Ends; after a run that came to its end those who look still see that."""
        if kind is None and time.monotonic() - self._looked < 3 * self._every:
            self._last.wait(2 * self._every)
        self._server.shutdown()
        self.close()

    def close(self) -> None:
        """Gives the port back; also where nothing was ever served."""
        self._server.server_close()

    def show(self, record: Mapping[str, Any]) -> None:
        """A new record: it lies in the folder already, where the next look finds it."""

    @property
    def ended(self) -> bool:
        """Whether no run goes on any more."""
        with contextlib.suppress(ValueError, OSError, KeyError):
            return self._over(page.gather(self._folders).runs)
        return False

    def _over(self, runs: Sequence[Run]) -> bool:
        """A comparison goes on between two of its runs; one that was stopped does not."""
        states = [run.facts.get("state") for run in runs]
        if not states or "running" in states:
            return False
        waits = [read_comparison(folder).asked for folder in self._folders if is_comparison(folder)]
        return "cancelled" in states or all(len(states) >= asked for asked in waits)

    def look(self, seen: str) -> tuple[HTTPStatus, str, str]:
        """(status, version, page) for somebody who has seen a version."""
        self._looked = time.monotonic()
        with self._lock:
            version = self._version()
            if version != self._drawn[0]:
                self._drawn = version, self._page()
        if seen == version:
            return HTTPStatus.NOT_MODIFIED, version, ""
        return HTTPStatus.OK, *self._drawn

    def _page(self) -> str:
        shown = page.gather(self._folders)._replace(foretold=self.foretold)
        return page.render(shown, {"every": self._every, "ended": self._over(shown.runs), "kept": self._kept})

    def delivered(self, text: str) -> None:
        """Notes that somebody has a page."""
        if '"ended": true' in text:
            self._last.set()

    def _version(self) -> str:
        """Another word whenever a file of the runs has changed."""
        inner = [one for folder in self._folders if is_comparison(folder) for one in sorted(folder.iterdir())]
        files = [folder / name for folder in (*self._folders, *inner) for name in _FILES]
        facts = []
        for file in files:
            with contextlib.suppress(OSError):
                found = file.stat()
                facts.append((str(file), found.st_mtime_ns, found.st_size))
        return f'"{hashlib.sha256(repr((facts, sorted(self.foretold))).encode()).hexdigest()[:20]}"'


def _bound(port: int, live: Live) -> ThreadingHTTPServer:
    try:
        return _Server((HOST, port), type("_Bound", (_Handler,), {"live": live}))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"port {port} of {HOST} cannot be used: {reason}. Choose another --port, or leave it out for a free one."
        ) from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader who went away is no matter for a run's screen."""


class _Handler(BaseHTTPRequestHandler):
    live: Live

    def do_GET(self) -> None:
        if self.headers.get("Host", "") not in self._own():
            return self._answer(HTTPStatus.FORBIDDEN, "Not under this name.")
        if self.path.split("?")[0] != "/":
            return self._answer(HTTPStatus.NOT_FOUND, "There is one page: /")
        try:
            status, version, text = self.live.look(self.headers.get("If-None-Match", ""))
        except Exception:  # a folder that is being written
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, _NOT_YET)
        self._answer(status, text, version)
        return self.live.delivered(text)

    def _own(self) -> list[str]:
        port = int(self.server.server_address[1])  # type: ignore[index]
        return [f"{HOST}:{port}", f"localhost:{port}"]

    def _answer(self, status: HTTPStatus, text: str, version: str = "") -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        for name, value in (_HEADERS | ({"ETag": version} if version else {})).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen of a run."""
