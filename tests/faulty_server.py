"""A web server on this machine that serves a folder, and fails as it is told to.

It runs aiohttp in a thread of its own. Faults are dealt out in the order in which requests for a
path come; what was asked for is kept, so that a test can count.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ssl
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web


@dataclass(frozen=True)
class Fault:
    """What one answer does instead of being right."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Another body, sent with its own length."""
    reset_after: int | None = None
    """Bytes of the body after which the connection is reset."""
    short_by: int = 0
    """Bytes of the announced body that are never sent; the connection is closed."""
    stall_after: int | None = None
    """Bytes of the body after which nothing comes any more."""
    drip_seconds: float | None = None
    """One byte of the body, then so long nothing, and again."""
    endless: bool = False
    """A body in pieces that does not end."""
    etag: str | None = None
    flip: bool = False
    """One bit of the body is wrong."""


@dataclass
class Asked:
    """One request."""

    path: str
    range: str | None
    authorization: str | None
    query: str


class FaultyServer:
    """A folder at `url`; `faults[path]` are used up one request at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.asked: list[Asked] = []
        self.latency = 0.0
        self.held: set[str] = set()
        """Paths whose answers wait until they are taken out."""
        self.password: str | None = None
        """user:password, asked for of everybody."""
        self.url = ""
        self.busiest = 0
        """Most requests that were answered at one time."""
        self._busy = 0

    def count(self, ending: str = "") -> int:
        """Requests for paths that end so."""
        return sum(asked.path.endswith(ending) for asked in self.asked)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        key = request.path.lstrip("/")
        self.asked.append(
            Asked(
                key,
                request.headers.get("Range"),
                request.headers.get("Authorization"),
                request.query_string,
            )
        )
        fault = self.faults[key].pop(0) if self.faults[key] else self.always.get(key, Fault())
        self._busy += 1
        self.busiest = max(self.busiest, self._busy)
        try:
            if self.latency:
                await asyncio.sleep(self.latency)
            while key in self.held:
                await asyncio.sleep(0.01)
            return await self._send(request, key, fault)
        finally:
            self._busy -= 1

    async def _send(self, request: web.Request, key: str, fault: Fault) -> web.StreamResponse:
        if self.password is not None:
            expected = f"Basic {base64.b64encode(self.password.encode()).decode()}"
            if request.headers.get("Authorization") != expected:
                return web.Response(status=401)
        if fault.status is not None:
            return web.Response(status=fault.status, headers=fault.headers, text="no")
        path = self.folder / key
        if not path.is_file():
            return web.Response(status=404)
        body = path.read_bytes() if fault.body is None else fault.body
        if fault.flip:
            body = body[:-1] + bytes([body[-1] ^ 1])
        etag = fault.etag or f'"{hashlib.md5(path.read_bytes()).hexdigest()}"'
        start, status = 0, 200
        asked = request.headers.get("Range")
        headers = {
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            **fault.headers,
        }
        if asked and request.headers.get("If-Range") == etag:
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        response = web.StreamResponse(status=status, headers=headers)
        rest = body[start:]
        if not fault.endless:
            response.content_length = len(rest)
        await response.prepare(request)
        assert request.transport is not None
        if fault.endless:
            while True:
                await response.write(bytes(1 << 16))
        if fault.drip_seconds is not None:
            for place in range(len(rest)):
                await response.write(rest[place : place + 1])
                await asyncio.sleep(fault.drip_seconds)
        if fault.stall_after is not None:
            await response.write(rest[: fault.stall_after])
            await asyncio.sleep(3600)
        if fault.reset_after is not None:
            await response.write(rest[: fault.reset_after])
            await asyncio.sleep(0.05)
            request.transport.abort()
            return response
        if fault.short_by:
            await response.write(rest[: -fault.short_by])
            await asyncio.sleep(0.05)
            request.transport.close()
            return response
        await response.write(rest)
        await response.write_eof()
        return response


@contextmanager
def serving(folder: Path, *, tls: ssl.SSLContext | None = None) -> Iterator[FaultyServer]:
    """Serve a folder on 127.0.0.1 until the block ends."""
    server = FaultyServer(folder)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", server.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        host, port = runner.addresses[0][:2]
        server.url = f"{'http' if tls is None else 'https'}://{host}:{port}"
        ready.set()
        await stop.wait()
        await runner.cleanup()
        await asyncio.sleep(0.05)  # connections close in turns of the loop

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(main())
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
