"""One image from where its URL says."""

from __future__ import annotations

import base64
import http.client
import io
import socket
import time
import urllib.error
import urllib.request
from email.message import Message
from functools import lru_cache, partial
from typing import IO, Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from milan_pipe.errors import DataError, MilanError, one_line
from milan_pipe.storage import SCHEMES, Location, location_of, split_url

MAX_DOWNLOADED_BYTES = 2**25
"""Size in bytes above which what a URL leads to is refused."""

# Seconds between two tries.
_WAITS = (0.5, 1.0)
_PIECE = 2**16
_BUSY = (408, 425, 429, 500, 502, 503, 504)


def download(url: str, seconds: float) -> bytes:
    """The bytes that a URL leads to.

    Args:
        seconds: for one try with all its redirects; there are three where a server is busy or cannot be reached.

    Raises:
        DataError: it is not there, larger than `MAX_DOWNLOADED_BYTES`, or not to be had; one line without the URL.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise DataError(f"addresses that begin with {scheme}:// are not read; expected a path, or {known}")
    if scheme not in ("http", "https"):
        return _from_store(url)
    for wait in (*_WAITS, None):
        try:
            return _get(_request(url), seconds)
        except _BusyError as error:
            if wait is None:
                raise DataError(f"{error} (tried {len(_WAITS) + 1} times)") from None
            time.sleep(wait)
    raise AssertionError


class _BusyError(Exception):
    """Another try may help."""


def _left(ends: float) -> float:
    """Seconds until a time of the monotonic clock; raises TimeoutError where it is over."""
    if (left := ends - time.monotonic()) <= 0:
        raise TimeoutError
    return left


class _Timed(io.RawIOBase):
    """A connection that is read until a time of the clock."""

    def __init__(self, connection: socket.socket, raw: io.RawIOBase, ends: float) -> None:
        self._connection, self._raw, self._ends = connection, raw, ends

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._connection.settimeout(_left(self._ends))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, ends: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp: Any = io.BufferedReader(_Timed(sock, self.fp.detach(), ends))


class _Bounded(urllib.request.AbstractHTTPHandler):
    """Takes the time at which all has to be there as the timeout, which the library hands on when it is redirected.

    What the library does with a timeout bounds the wait for each piece, and a server may send one byte at a time.
    """

    def do_open(self, http_class: Any, req: urllib.request.Request, **http_conn_args: Any) -> http.client.HTTPResponse:
        def connect(host: str, timeout: float, **kwargs: Any) -> http.client.HTTPConnection:
            connection: http.client.HTTPConnection = http_class(host, timeout=_left(timeout), **kwargs)
            connection.response_class = partial(_Answer, ends=timeout)  # type: ignore[assignment]
            return connection

        return super().do_open(connect, req, **http_conn_args)  # type: ignore[arg-type]


class _Http(_Bounded, urllib.request.HTTPHandler):
    pass


class _Https(_Bounded, urllib.request.HTTPSHandler):
    pass


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to web servers alone: by the library, `ftp:` is followed as well."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme.lower()
        if scheme not in ("http", "https"):
            raise DataError(f"its server redirects to {scheme}:, which is not followed")
        # The library reads what comes with a redirect to its end, if it has one.
        fp.close()
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    kinds: tuple[type[urllib.request.BaseHandler], ...] = (
        urllib.request.ProxyHandler,
        _Http,
        _Https,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _WebOnly,
    )
    for kind in kinds:
        opener.add_handler(kind())
    return opener


def _request(url: str) -> urllib.request.Request:
    try:
        parts = urlsplit(url)
        login, _, host = parts.netloc.rpartition("@")
        # As browsers do with addresses that hold spaces and letters of other alphabets.
        path, query = quote(parts.path, safe="/%:@!$&'()*+,;=~"), quote(parts.query, safe="/?%:@!$&'()*+,;=~")
        plain = SplitResult(parts.scheme.lower(), host.encode("idna").decode(), path, query, "").geturl()
        # Its scheme has been checked, and the opener knows no other than those of the web.
        request = urllib.request.Request(plain, headers={"User-Agent": "milan-pipe"})  # noqa: S310
    except ValueError:
        raise DataError("its URL cannot be understood") from None
    if login:
        # Not sent on to where a redirect leads.
        coded = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {coded}")
    return request


def _get(request: urllib.request.Request, seconds: float) -> bytes:
    pieces: list[bytes] = []
    size = 0
    try:
        with _opener().open(request, timeout=time.monotonic() + seconds) as answer:
            while piece := answer.read1(_PIECE):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_DOWNLOADED_BYTES:
                    raise DataError(f"larger than the {MAX_DOWNLOADED_BYTES} bytes that are fetched")
            if answer.length:
                raise _BusyError(f"cut off {answer.length} bytes before its end")
    except urllib.error.HTTPError as error:
        # What it says itself may hold the address that it redirects to.
        reason = f"its server answered {error.code} {http.client.responses.get(error.code, '')}".rstrip()
        error.close()
        raise (_BusyError if error.code in _BUSY else DataError)(reason) from None
    except urllib.error.URLError as error:
        raise _BusyError(_reason(error.reason, seconds)) from None
    except DataError:
        raise
    # Of an address that it redirects to as well.
    except (http.client.InvalidURL, ValueError):
        raise DataError("its URL cannot be understood") from None
    except (OSError, http.client.HTTPException) as error:
        raise _BusyError(_reason(error, seconds)) from None
    return b"".join(pieces)


def _reason(error: Any, seconds: float) -> str:
    return f"not there after {seconds:g} s" if isinstance(error, TimeoutError) else f"no answer: {one_line(error)}"


@lru_cache(maxsize=64)
def _location(folder: str) -> Location:
    return location_of(folder)


def stored(location: Location, path: str) -> bytes:
    """The bytes of a file in an object store or on a hub; raises DataError as `download`."""
    try:
        if location.size(path) > MAX_DOWNLOADED_BYTES:
            raise DataError(f"larger than the {MAX_DOWNLOADED_BYTES} bytes that are fetched")
        return location.read(path)
    except DataError:
        raise
    except MilanError as error:
        raise DataError(str(error)) from None


def _from_store(url: str) -> bytes:
    folder, name = split_url(url)
    try:
        location = _location(folder)
    except MilanError as error:
        raise DataError(str(error)) from None
    return stored(location, name)
