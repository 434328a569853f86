"""Objects of a cache behind a URL, one at a time: over HTTP(S), or from S3, Google Cloud or Azure.

Nothing that a server says is believed: an object is whole when its length and SHA-256 are those of
the manifest. No host is asked that was not named, and no message holds a user, a password or a
signature that stood in the URL. Where an object lies locally is had_pipe.cache.mirror's.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from had_pipe import __version__
from had_pipe.cache.layout import (
    LARGEST_PLAN,
    MANIFEST,
    PLAN,
    Manifest,
    ObjectRecord,
    Plan,
    manifest_limit,
    parse_manifest,
    parse_plan,
)
from had_pipe.cache.reader import expected_keys, refuse_endless
from had_pipe.errors import CacheCorrupt, CacheRefused, NetworkError, RecipeError, shown

_SCHEMES = {"http": 80, "https": 443, "s3": None, "gs": None, "az": None}

_ATTEMPTS = 6
"""Failures in a row after which an object is given up; one that moves on begins to count anew."""
_MOVED_ON = 1 << 20
_LONGEST_PAUSE = 60.0
_REDIRECTS = 5
_PLAIN = "/?%~!$&'()*+,;=:@-._"
"""Stands in a URL as it is, letters and digits apart; `%` too, for what is escaped stays so."""
_PIECE = 1 << 20
_SLOWEST = 1 << 16
"""Bytes that must come while patience lasts: a server that drips is one that hangs."""

_ABSENT = "it is not there; expected the URL of a finished cache's folder"

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")
_STATUS = re.compile(r"\b([1-5]\d\d) [A-Z]")


def is_url(source: Path | str) -> bool:
    """Whether a cache is named by a URL and not by a path."""
    return isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


class Remote:
    """The objects below one URL. Safe to share between threads."""

    def __init__(self, url: str, *, patience: float = 30.0, pause: float = 0.5) -> None:
        """`patience` is how many seconds a server may be silent; the first retry comes after about
        `pause` seconds, every further one after twice as long.
        """
        parts = _split(url)
        self.url = _shown(parts)
        """As messages have it: without user, password, query and fragment."""
        self.retries = 0
        self._pause = pause
        self._closing = threading.Event()
        self._jitter = random.Random()  # not the module's, whose state may be somebody's seed
        self._transport: _Transport
        if parts.scheme in ("http", "https"):
            self._transport = _Http(parts, patience=patience)
        else:
            self._transport = _Bucket(parts, patience=patience)

    def describe(self) -> tuple[Plan, Manifest]:
        """Plan and manifest, held against each other: they name all that may be asked for."""
        place = Path(self.url)  # as the messages of whoever parses have it
        try:
            plan = parse_plan(place, self.read(PLAN, limit=LARGEST_PLAN))
            manifest = parse_manifest(place, self.read(MANIFEST, limit=manifest_limit(plan)))
            refuse_endless(place, plan, manifest)
        except CacheRefused as error:
            raise CacheRefused(str(error).replace(str(place), self.url)) from None
        objects = manifest.objects
        if (
            manifest.plan != plan.id
            or set(objects) != expected_keys(plan)
            or objects[PLAN] != ObjectRecord(nbytes=len(plan.to_json()), sha256=plan.id)
        ):
            raise CacheRefused(
                f"{self.url}: {MANIFEST} does not list what {PLAN} implies: the files of two "
                "caches were mixed, or one was replaced just now; try again, or tell whoever "
                "serves it"
            )
        largest = max(objects, key=lambda key: objects[key].nbytes)
        if objects[largest].nbytes > plan.largest_nbytes:
            raise CacheRefused(
                f"{self.url}: {largest} is said to have {objects[largest].nbytes:,} bytes, more "
                f"than the {plan.largest_nbytes:,} that the plan implies; use another source"
            )
        return plan, manifest

    def read(self, key: str, *, limit: int) -> bytes:
        """A small object of which nothing is known yet but the most bytes that it can have."""
        found = bytearray()

        def begin(start: int) -> None:
            del found[start:]

        def take(piece: Any) -> None:
            if len(found) + len(piece) > limit:
                raise _Wrong(f"more than {limit:,} bytes, expected at most so many")
            found.extend(piece)

        self._bring(key, None, begin, take, lambda: None)
        return bytes(found)

    def download(self, key: str, record: ObjectRecord, file: Any) -> None:
        """Write an object into an open file from its beginning; it is what its record says.

        Raises NetworkError, or CacheCorrupt where what comes is something else, twice.
        """
        digest = hashlib.sha256()

        def begin(start: int) -> None:
            nonlocal digest
            file.seek(start)
            if start == 0:
                digest = hashlib.sha256()

        def take(piece: Any) -> None:
            digest.update(piece)
            left = memoryview(piece)
            while left:
                left = left[file.write(left) :]

        def end() -> None:
            if digest.hexdigest() != record.sha256:
                raise _Wrong(
                    f"SHA-256 is {digest.hexdigest()[:12]}..., the manifest says "
                    f"{record.sha256[:12]}..."
                )

        self._bring(key, record.nbytes, begin, take, end)

    def close(self) -> None:
        """Stop what is under way, in whatever thread."""
        self._closing.set()
        self._transport.close()

    def _bring(
        self,
        key: str,
        nbytes: int | None,
        begin: Callable[[int], None],
        take: Callable[[Any], None],
        end: Callable[[], None],
    ) -> None:
        """Get an object, again and again where that may help, from where it stopped if possible."""
        done = furthest = failures = 0
        etag: str | None = None
        spoilt = False
        while True:
            failed: _Again | _Wrong
            try:
                # Only what is known to be the same object is gone on with.
                with self._transport.get(key, start=done if etag else 0, etag=etag) as body:
                    done, etag = body.start, body.etag
                    begin(done)
                    if nbytes is not None and body.nbytes not in (None, nbytes):
                        raise _Wrong(f"{body.nbytes:,} bytes, the manifest says {nbytes:,}")
                    for piece in body.pieces:
                        if self._closing.is_set():
                            raise _Again("stopped")
                        done += len(piece)
                        if nbytes is not None and done > nbytes:
                            raise _Wrong(f"more than the {nbytes:,} bytes that the manifest says")
                        take(piece)
                expected = nbytes if nbytes is not None else body.nbytes
                if expected is not None and done < expected:
                    raise _Again(f"the answer ended after {done:,} of {expected:,} bytes")
                end()
                return
            except (_Again, _Wrong) as error:
                failed = error
            except _Stop as error:
                told = str(error)
                raise NetworkError(f"{self.url}/{key}: {told}") from None
            if self._closing.is_set():
                raise NetworkError(f"{self.url}/{key}: the download was stopped")
            if isinstance(failed, _Wrong):
                if spoilt:
                    raise CacheCorrupt(
                        f"{self.url}/{key}: {failed} (asked for twice); what lies there is damaged "
                        "or another cache's: tell whoever serves it"
                    ) from None
                spoilt, done, etag = True, 0, None
            if done >= furthest + _MOVED_ON:
                furthest, failures = done, 0
            failures += 1
            if failures == _ATTEMPTS:
                raise NetworkError(
                    f"{self.url}/{key}: {failed} (after {_ATTEMPTS} attempts); run the same "
                    "command again once the server answers: objects that have come are kept"
                ) from None
            self.retries += 1
            pause = self._pause * 2 ** (failures - 1) * self._jitter.uniform(0.5, 1.5)
            wished = failed.pause if isinstance(failed, _Again) else 0.0
            self._closing.wait(min(max(pause, wished), _LONGEST_PAUSE))


@dataclass(frozen=True)
class _Body:
    """An answer: what comes of an object."""

    pieces: Iterator[Any]
    start: int
    """Where in the object they begin."""
    nbytes: int | None
    """Of the whole object, where the server tells."""
    etag: str | None
    """Names this very object, where the server does."""


class _Transport(Protocol):
    def get(self, key: str, *, start: int, etag: str | None) -> AbstractContextManager[_Body]:
        """An object from byte `start` on, if it still has this tag, else from its beginning.

        Raises _Again, _Wrong and _Stop, and nothing else where the other side is at fault.
        """

    def close(self) -> None: ...


class _Again(Exception):
    """It may go better the next time, after `pause` seconds at least."""

    def __init__(self, told: str, pause: float = 0.0) -> None:
        super().__init__(told)
        self.pause = pause


class _Wrong(Exception):
    """Something else came than was to come."""


class _Stop(Exception):
    """It will not go better the next time."""


def _split(url: str) -> SplitResult:
    """A URL in its parts. Raises RecipeError, which does not quote what may be secret."""
    known = "http://, https://, s3://, gs:// or az://"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise RecipeError(f"a URL that cannot be read; expected one with {known}") from None
    if parts.scheme not in _SCHEMES:
        named = f"{shown(parts.scheme)}://..." if parts.scheme else "a name that is no URL"
        raise RecipeError(
            f"{named}: a cache can be read from {known} or a folder; give one of these, or "
            "download it"
        )
    if not parts.hostname or shown(url) != url or " " in url:
        raise RecipeError(f"{_shown(parts)}: not a URL of a folder; expected {known} and a host")
    if parts.scheme not in ("http", "https") and ("@" in parts.netloc or parts.query):
        raise RecipeError(
            f"{_shown(parts)}: takes no user and no query; credentials come from the environment, "
            "such as AWS_ACCESS_KEY_ID"
        )
    return parts


def _shown(parts: SplitResult) -> str:
    """A URL as messages have it."""
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    with suppress(ValueError):
        host = f"{host}:{parts.port}" if parts.port else host
    return f"{parts.scheme}://{host}{parts.path}".rstrip("/")


# HTTP


class _Http:
    """Plain HTTP: connections kept open, no cookies, no redirect to another host."""

    def __init__(self, parts: SplitResult, *, patience: float) -> None:
        assert parts.hostname is not None
        self._scheme, self._host = parts.scheme, parts.hostname
        self._port = parts.port or _SCHEMES[parts.scheme]
        self._base = quote(parts.path, safe=_PLAIN).rstrip("/")
        self._query = f"?{quote(parts.query, safe=_PLAIN)}" if parts.query else ""
        self._patience = patience
        self._headers = {
            "User-Agent": f"had-pipe/{__version__}",
            "Accept-Encoding": "identity",
        }
        if parts.username is not None:
            self._headers["Authorization"] = _basic(parts.username, parts.password)
        self._idle: list[http.client.HTTPConnection] = []
        # A connection forgets its socket where the answer to come is the last.
        self._busy: dict[http.client.HTTPConnection, socket.socket] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._proxy = _proxy(parts.scheme, parts.hostname)

    @contextmanager
    def get(self, key: str, *, start: int, etag: str | None) -> Iterator[_Body]:
        headers = dict(self._headers)
        if start:
            assert etag is not None
            headers |= {"Range": f"bytes={start}-", "If-Range": etag}
        try:
            connection, response = self._answer(f"{self._base}/{quote(key)}{self._query}", headers)
        except (OSError, http.client.HTTPException) as error:
            raise _in_words(error, self._patience) from None
        whole = False
        try:
            yield self._body(connection, response, start)
            # None where it comes in pieces that tell themselves which is the last.
            whole = response.length == 0 or (response.length is None and response.isclosed())
        finally:
            response.close()
            if whole and not response.will_close:
                self._keep(connection)
            else:
                self._drop(connection)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for sock in self._busy.values():
                _hang_up(sock)
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _answer(
        self, target: str, headers: dict[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """The answer to a request, redirections on the same host followed."""
        for _ in range(_REDIRECTS):
            connection, response = self._send(target, headers)
            if response.status not in (301, 302, 303, 307, 308):
                return connection, response
            place = response.headers.get("Location", "")
            response.close()
            self._drop(connection)
            target = self._redirected(target, place)
        raise _Stop(f"redirected more than {_REDIRECTS} times; give the URL where the cache lies")

    def _redirected(self, target: str, place: str) -> str:
        """The target that a redirection names. Raises _Stop where it is on another host."""
        try:
            parts = urlsplit(urljoin(f"{self._scheme}://{self._authority}{target}", place))
            port = parts.port or _SCHEMES.get(parts.scheme)
        except ValueError:
            raise _Stop("redirected to what is no URL; give the URL where the cache lies") from None
        if (parts.scheme, parts.hostname, port) != (self._scheme, self._host, self._port):
            raise _Stop(
                f"redirected to {shown(_shown(parts._replace(path='')))}, which was not named; if "
                "you trust it, give the URL there"
            )
        query = f"?{quote(parts.query, safe=_PLAIN)}" if parts.query else ""
        return f"{quote(parts.path or '/', safe=_PLAIN)}{query}"

    def _send(
        self, target: str, headers: dict[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request; over a new connection where the kept one has gone stale."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                return connection, self._ask(connection, target, headers)
            except (ConnectionError, http.client.BadStatusLine):
                self._drop(connection)
            except BaseException:
                self._drop(connection)
                raise
        connection = self._connection()
        try:
            return connection, self._ask(connection, target, headers)
        except BaseException:
            self._drop(connection)
            raise

    def _ask(
        self, connection: http.client.HTTPConnection, target: str, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        if connection.sock is None:
            connection.connect()
        with self._lock:
            if self._closed:
                raise _Again("stopped")
            self._busy[connection] = connection.sock
        if self._proxy is not None and self._tls is None:
            target = f"http://{self._authority}{target}"
            headers = headers | self._proxy.headers
        with self._watched(connection):
            connection.request("GET", target, headers=headers)
            return connection.getresponse()

    @contextmanager
    def _watched(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        """End a connection where reading takes too long, though something always comes.

        A socket's timeout is for one read, and headers are many.
        """
        late = threading.Event()
        sock = self._busy[connection]

        def end() -> None:
            late.set()
            _hang_up(sock)

        watch = threading.Timer(2 * self._patience, end)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()
        if late.is_set():  # what was cut off here can look like an end
            raise _Again("an answer that goes on and says nothing")

    def _connection(self) -> http.client.HTTPConnection:
        host, port = (
            (self._host, self._port)
            if self._proxy is None
            else (self._proxy.host, self._proxy.port)
        )
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=self._patience)
        made = http.client.HTTPSConnection(host, port, timeout=self._patience, context=self._tls)
        if self._proxy is not None:
            made.set_tunnel(self._host, self._port, headers=self._proxy.headers)
        return made

    @property
    def _authority(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return host if self._port == _SCHEMES[self._scheme] else f"{host}:{self._port}"

    def _body(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, start: int
    ) -> _Body:
        status = response.status
        if status == 416:
            raise _Wrong("the object is shorter than it was a moment ago")
        if status in (408, 425, 429) or status >= 500:
            raise _Again(f"the server answers {_answered(response)}", _retry_after(response))
        if status in (401, 403):
            raise _Stop(
                f"the server answers {_answered(response)}: access is refused; look at user, "
                "password or signature in the URL, which may have expired"
            )
        if status in (404, 410):
            raise _Stop(f"the server answers {_answered(response)}: {_ABSENT}")
        if status not in (200, 206):
            raise _Stop(f"the server answers {_answered(response)}, expected 200")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise _Stop(
                f"the server sends it in {encoding[:20]!r} encoding though it was asked not to; "
                "let it serve the files as they are"
            )
        etag = response.headers.get("ETag", "")
        # A weak tag does not say that bytes are the same.
        known = etag if re.fullmatch(r'"[\x21\x23-\x7e]{0,500}"', etag) else None
        pieces = self._pieces(connection, response)
        if status == 200:
            return _Body(pieces, 0, response.length, known)
        told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if told is None or int(told[1]) != start:
            raise _Wrong("the server sends another range than it was asked for")
        return _Body(pieces, start, int(told[2]), known)

    def _pieces(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> Iterator[bytes]:
        since, came = time.monotonic(), 0
        while True:
            try:
                # A body in chunks has lines between these, and headers at its end.
                with self._watched(connection) if response.chunked else nullcontext():
                    piece = response.read1(_PIECE)
            except (OSError, http.client.HTTPException) as error:
                raise _in_words(error, self._patience) from None
            if not piece:
                return
            came += len(piece)
            now = time.monotonic()
            if now - since > self._patience:
                if came < _SLOWEST:
                    raise _Again(f"only {came:,} bytes came in {now - since:.0f} s")
                since, came = now, 0
            yield piece

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._busy.pop(connection, None)
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._busy.pop(connection, None)
        connection.close()


@dataclass(frozen=True)
class _Proxy:
    host: str
    port: int
    headers: dict[str, str]


def _proxy(scheme: str, host: str) -> _Proxy | None:
    """The proxy that the environment names for a host, if any."""
    named = urllib.request.getproxies().get(scheme)
    if not named or urllib.request.proxy_bypass(host):
        return None
    parts = urlsplit(named if "://" in named else f"http://{named}")
    if parts.scheme != "http" or not parts.hostname:
        raise RecipeError(
            f"{scheme}_proxy in the environment is no http:// proxy; correct it, or unset it and "
            f"set no_proxy={host}"
        )
    headers = {}
    if parts.username is not None:
        headers["Proxy-Authorization"] = _basic(parts.username, parts.password)
    return _Proxy(parts.hostname, parts.port or 80, headers)


def _basic(user: str, password: str | None) -> str:
    pair = f"{unquote(user)}:{unquote(password or '')}".encode()
    return f"Basic {b64encode(pair).decode('ascii')}"


def _answered(response: http.client.HTTPResponse) -> str:
    """A status in the standard's words: the server's own may say anything."""
    return f"{response.status} {http.client.responses.get(response.status, '')}".rstrip()


def _retry_after(response: http.client.HTTPResponse) -> float:
    wished = response.headers.get("Retry-After", "")
    return float(wished) if re.fullmatch(r"\d{1,4}", wished) else 0.0


def _hang_up(sock: socket.socket) -> None:
    """End a connection under whoever reads from it: it reads nothing more."""
    with suppress(OSError):
        # Not a TLS socket's own, which takes from under the reader what it decrypts with.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _in_words(error: OSError | http.client.HTTPException, patience: float) -> _Again | _Stop:
    """What a failing connection means. Its own text may hold anything."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _Stop(
            f"its certificate is not to be trusted ({error.verify_message}); correct the URL, or "
            "name its authority in SSL_CERT_FILE"
        )
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_AGAIN:
            return _Again("the name of the host could not be looked up")
        return _Stop("there is no host of this name; correct the URL")
    if isinstance(error, TimeoutError):
        return _Again(f"nothing came for {patience:.0f} s")
    if isinstance(error, http.client.HTTPException):
        return _Again("the answer is no HTTP, or was cut off")
    if isinstance(error, ssl.SSLError):
        return _Again("the encrypted connection broke down")
    return _Again(f"the connection failed ({os.strerror(error.errno or 0)})")


# Object stores


class _Bucket:
    """S3, Google Cloud Storage or Azure by obstore: it signs, we verify and retry."""

    def __init__(self, parts: SplitResult, *, patience: float) -> None:
        try:
            from obstore.store import from_url
        except ImportError:
            raise RecipeError(
                f"{_shown(parts)}: reading from {parts.scheme}:// needs obstore; "
                "pip install 'had-pipe[remote]'"
            ) from None
        self._patience = patience
        self._scheme = parts.scheme
        signs, skip = _SIGNS[parts.scheme]
        self._signed = skip in os.environ or any(name in os.environ for name in signs)
        if parts.scheme == "gs":
            self._signed |= (Path.home() / _GOOGLE).is_file()
        plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
        failed = False
        try:
            self._store: Any = from_url(
                _shown(parts),
                client_options={
                    "connect_timeout": f"{patience}s",
                    "read_timeout": f"{patience}s",
                    "timeout": "7days",
                    "user_agent": f"had-pipe/{__version__}",
                    "allow_http": plain,
                },
                retry_config={"max_retries": 0},
                # Unsigned where there is nothing to sign with, or obstore would ask the cloud's
                # own address for a machine's role, and wait for that wherever there is none.
                config={} if self._signed else {"skip_signature": True},
            )
        except Exception:
            failed = True
        if failed:  # its own message may hold what stands in the environment
            raise RecipeError(
                f"{_shown(parts)}: no store can be made of this URL and the environment; expected "
                "s3://BUCKET/PATH, gs://BUCKET/PATH, or az://CONTAINER/PATH and "
                f"AZURE_STORAGE_ACCOUNT_NAME; credentials stand in {signs[0]} and its like"
            )

        # Waited for from here, so that it can be left: a call of obstore's that blocks cannot.
        self._closing = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="had-pipe bucket", daemon=True)
        self._thread.start()

    @contextmanager
    def get(self, key: str, *, start: int, etag: str | None) -> Iterator[_Body]:
        import obstore

        options: Any = {"range": {"offset": start}, "if_match": etag} if start else {}
        found = self._wait(lambda: obstore.get_async(self._store, key, options=options))
        meta = found.meta
        yield _Body(self._pieces(found), found.range[0], meta["size"], meta["e_tag"])

    def close(self) -> None:
        if not self._closing.is_set():
            self._closing.set()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5)

    def _run(self) -> None:
        async def end() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        self._loop.run_forever()
        self._loop.run_until_complete(end())
        self._loop.close()

    def _wait(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What obstore brings when asked in the loop, for the thread that wants it."""
        from obstore.exceptions import BaseError

        async def bring() -> Any:
            return await ask()

        bringing = bring()
        try:
            coming = asyncio.run_coroutine_threadsafe(bringing, self._loop)
        except RuntimeError:  # the loop was closed just now
            bringing.close()
            raise _Again("stopped") from None
        late = time.monotonic() + 2 * self._patience
        while True:
            try:
                return coming.result(timeout=0.2)
            except (OSError, BaseError) as error:
                # Of a result that is still to come, or one that tells of a time out itself.
                if not isinstance(error, TimeoutError) or coming.done():
                    raise self._in_words(error) from None
            except CancelledError:
                raise _Again("stopped") from None
            if self._closing.is_set() or time.monotonic() > late:
                coming.cancel()
                raise _Again(f"too little came in {2 * self._patience:.0f} s")

    def _pieces(self, found: Any) -> Iterator[Any]:
        stream = found.stream(min_chunk_size=_PIECE)
        while piece := self._wait(lambda: anext(stream, None)):
            yield piece

    def _in_words(self, error: Exception) -> _Again | _Wrong | _Stop:
        """What obstore's error means, without its text, which may hold a signed URL."""
        from obstore import exceptions

        if isinstance(error, FileNotFoundError):
            return _Stop(_ABSENT)
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            signs, skip = _SIGNS[self._scheme]
            told = "the credentials in the environment do not allow it"
            if not self._signed:
                told = (
                    f"not to be had without credentials; set {signs[0]} and what belongs to it, or "
                    f"{skip}=false to ask this machine for its role"
                )
            return _Stop(f"access is refused: {told}")
        if isinstance(error, exceptions.PreconditionError):
            return _Wrong("the object changed while it was read")
        found = _STATUS.search(str(error))
        status = int(found[1]) if found else 0
        if 300 <= status < 500 and status not in (408, 425, 429):
            told = "; is AWS_REGION the bucket's?" if status < 400 and self._scheme == "s3" else ""
            return _Stop(f"the store answers {status}{told}")
        return _Again(f"the store answers {status}" if status else "the store cannot be reached")


_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
    "GOOGLE_BASE_URL",
)
"""Servers that are named in place of the provider's."""

_GOOGLE = ".config/gcloud/application_default_credentials.json"

_SIGNS = {
    "s3": (
        (
            "AWS_ACCESS_KEY_ID",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        ),
        "AWS_SKIP_SIGNATURE",
    ),
    "gs": (
        (
            "GOOGLE_APPLICATION_CREDENTIALS",
            "GOOGLE_SERVICE_ACCOUNT",
            "GOOGLE_SERVICE_ACCOUNT_PATH",
            "GOOGLE_SERVICE_ACCOUNT_KEY",
            "GOOGLE_BEARER_TOKEN",
        ),
        "GOOGLE_SKIP_SIGNATURE",
    ),
    "az": (
        (
            "AZURE_STORAGE_ACCOUNT_KEY",
            "AZURE_STORAGE_ACCESS_KEY",
            "AZURE_STORAGE_MASTER_KEY",
            "AZURE_STORAGE_SAS_KEY",
            "AZURE_STORAGE_SAS_TOKEN",
            "AZURE_STORAGE_CLIENT_ID",
            "AZURE_CLIENT_ID",
            "AZURE_USE_AZURE_CLI",
            "AZURE_STORAGE_TOKEN",
            "AZURE_FEDERATED_TOKEN_FILE",
        ),
        "AZURE_SKIP_SIGNATURE",
    ),
}
"""Variables that give credentials, and the one that says whether to sign."""
