"""A folder behind a link: HTTP on 127.0.0.1, every answer late, all together no faster than a rate.

    python benchmarks/link.py FOLDER [--latency SECONDS] [--rate BYTES_PER_SECOND]

prints its port and serves until its standard input ends.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic, sleep

PIECE = 256 << 10


class Line:
    """When the next bytes may go, of all connections together."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._free = 0.0
        self._lock = threading.Lock()

    def wait(self, nbytes: int) -> None:
        if self._rate is None:
            return
        with self._lock:
            now = monotonic()
            # A pause of less than 50 ms is made good: sleeping is not exact.
            begins = max(self._free, now - 0.05)
            self._free = begins + nbytes / self._rate
            due = self._free - now
        if due > 0:
            sleep(due)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, *, latency: float, rate: float | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.latency, self.line = folder.resolve(), latency, Line(rate)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        sleep(self.server.latency)
        path = (self.server.folder / self.path.lstrip("/")).resolve()
        if not path.is_relative_to(self.server.folder) or not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with path.open("rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            first, end = 0, nbytes
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                first = int(asked[1])
                end = min(nbytes, int(asked[2]) + 1) if asked[2] else nbytes
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{end - 1}/{nbytes}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(end - first))
            self.send_header("ETag", f'"{nbytes:x}"')
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            self.wfile.flush()
            while self.command == "GET" and first < end:
                piece = min(PIECE, end - first)
                self.server.line.wait(piece)
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, piece)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description="A folder behind a slow link.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.02)
    parser.add_argument("--rate", type=float)
    chosen = parser.parse_args()
    server = Server(chosen.folder, latency=chosen.latency, rate=chosen.rate)
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
