"""A web server on this machine that hands out files and misbehaves as it is told."""

from __future__ import annotations

import http.server
import re
import threading


class Server:
    """Hands out `files` (path -> bytes).

    `modes` (path -> mode, or a list with one for each request, the last for all that follow) says how: "ok", "hang",
    "close" without an answer, a status such as "503", "html", "wrong" bytes, "cut" or "stall" after half of them,
    "cut chunks", which tell no size, "no range", "cut, no range", "other range", a "short" range, "no If-Range".
    `headers` go with each answer; an "ETag" among them is held against If-Range. `requests` lists (path, Range header),
    `sent` the bytes of each answer. Asked for a tunnel, as a proxy is, it answers with the status `modes["CONNECT"]`.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.modes: dict[str, str | list[str]] = {}
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent: list[int] = []
        self.closing = threading.Event()
        answer, modes = self.answer, self.modes

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                answer(self)

            def do_CONNECT(self):
                self.send_error(int(modes.get("CONNECT", "501")))

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def mode(self, path: str) -> str:
        modes = self.modes.get(path, "ok")
        return modes if isinstance(modes, str) else modes.pop(0) if len(modes) > 1 else modes[0]

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path, wanted = request.path, request.headers.get("Range", "")
        self.requests.append((path, wanted))
        mode, body = self.mode(path), self.files.get(path, b"")
        if mode == "hang":
            self.closing.wait(20)
        elif mode.isdigit() or path not in self.files:
            request.send_error(int(mode) if mode.isdigit() else 404)
        elif mode != "close":
            if mode != "no If-Range" and request.headers.get("If-Range", "") not in ("", self.headers.get("ETag")):
                wanted = ""
            self.send(request, mode, body, int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0)

    def send(self, request: http.server.BaseHTTPRequestHandler, mode: str, body: bytes, start: int) -> None:
        if start >= len(body) > 0 and "no range" not in mode:
            request.send_error(416)
            return
        ranged = start > 0 and "no range" not in mode
        start = 1 if ranged and mode == "other range" else start if ranged else 0
        rest = b"<!doctype html><title>Log in to the hotel's network</title>" if mode == "html" else body[start:]
        rest = rest[:100] if mode == "short" else rest
        request.send_response(206 if ranged else 200)
        kind = "text/html" if mode == "html" else "application/octet-stream"
        size = {"Transfer-Encoding": "chunked"} if mode == "cut chunks" else {"Content-Length": str(len(rest))}
        for name, value in {**self.headers, "Content-Type": kind, **size}.items():
            request.send_header(name, value)
        if ranged:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.end_headers()
        rest = bytes(len(rest)) if mode == "wrong" else rest
        rest = rest[: len(rest) // 2] if mode.startswith(("cut", "stall")) else rest
        self.sent.append(len(rest))
        if mode == "cut chunks":
            request.wfile.write(b"%x\r\n" % (2 * len(rest)))
        request.wfile.write(rest)
        request.wfile.flush()
        if mode == "stall":
            self.closing.wait(20)
