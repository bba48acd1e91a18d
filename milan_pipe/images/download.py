"""One image from where its URL says."""

from __future__ import annotations

import base64
import http.client
import time
import urllib.error
import urllib.request
from email.message import Message
from functools import lru_cache
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
        seconds: for one try; there are three where a server is busy or cannot be reached.

    Raises:
        DataError: it is not there, larger than `MAX_DOWNLOADED_BYTES`, or not to be had; one line without the URL.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise DataError(f"addresses that begin with {scheme}:// are not read; expected a path, or {known}")
    if scheme not in ("http", "https"):
        return _from_store(url)
    request = _request(url)
    for wait in (*_WAITS, None):
        try:
            return _get(request, seconds)
        except _BusyError as error:
            if wait is None:
                raise DataError(f"{error} (tried {len(_WAITS) + 1} times)") from None
            time.sleep(wait)
    raise AssertionError


class _BusyError(Exception):
    """Another try may help."""


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to web servers alone: by the library, `ftp:` is followed as well."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme.lower()
        if scheme not in ("http", "https"):
            raise DataError(f"its server redirects to {scheme}:, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    kinds: tuple[type[urllib.request.BaseHandler], ...] = (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
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
        request = urllib.request.Request(plain, headers={"User-Agent": "milan-pipe"})
    except ValueError:
        raise DataError("its URL cannot be understood") from None
    if login:
        # Not sent on to where a redirect leads.
        coded = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {coded}")
    return request


def _get(request: urllib.request.Request, seconds: float) -> bytes:
    ends = time.monotonic() + seconds
    pieces: list[bytes] = []
    size = 0
    try:
        with _opener().open(request, timeout=seconds) as answer:
            while piece := answer.read1(_PIECE):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_DOWNLOADED_BYTES:
                    raise DataError(f"larger than the {MAX_DOWNLOADED_BYTES} bytes that are fetched")
                # The timeout is for a piece, and a server may send one byte at a time.
                if time.monotonic() > ends:
                    raise _BusyError(f"not there after {seconds:g} s")
            if answer.length:
                raise _BusyError(f"cut off {answer.length} bytes before its end")
    except urllib.error.HTTPError as error:
        # What it says itself may hold the address that it redirects to.
        reason = f"its server answered {error.code} {http.client.responses.get(error.code, '')}".rstrip()
        error.close()
        raise (_BusyError if error.code in _BUSY else DataError)(reason) from None
    except urllib.error.URLError as error:
        raise _BusyError(_reason(error.reason, seconds)) from None
    except http.client.InvalidURL:
        raise DataError("its URL cannot be understood") from None
    except (OSError, http.client.HTTPException) as error:
        raise _BusyError(_reason(error, seconds)) from None
    return b"".join(pieces)


def _reason(error: Any, seconds: float) -> str:
    return f"no answer in {seconds:g} s" if isinstance(error, TimeoutError) else f"no answer: {one_line(error)}"


@lru_cache(maxsize=64)
def _location(folder: str) -> Location:
    return location_of(folder)


def _from_store(url: str) -> bytes:
    folder, name = split_url(url)
    try:
        location = _location(folder)
        if location.size(name) > MAX_DOWNLOADED_BYTES:
            raise DataError(f"larger than the {MAX_DOWNLOADED_BYTES} bytes that are fetched")
        return location.read(name)
    except DataError:
        raise
    except MilanError as error:
        raise DataError(str(error)) from None
