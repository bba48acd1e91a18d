"""One line for a person from an error of obstore.

Its types tell what does not exist, was replaced or is not supported. Host, status, tries and cause are only in its
text, which holds addresses, XML and the debug form of Rust errors.
"""

from __future__ import annotations

import re

from obstore.exceptions import NotSupportedError, PreconditionError

from milan_pipe.errors import MilanError, MissingError, StoreError, one_line, resource_hint

_HOW_TO_SIGN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY, or AZURE_SKIP_SIGNATURE=true for a public container",
}
_ASKS_FOR_CREDENTIALS = re.compile(
    "/latest/api/token|/latest/meta-data|/computeMetadata/|/metadata/identity|//169\\.254\\."
)
# For S3 and Google, Azure, and all in words.
_NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|The specified bucket does not exist")
# By status: a list that is refused is a GenericError.
_ADVICE = {
    "401": "; check the credentials",
    "403": "; check the credentials, and what they may do here",
    "301": "; set AWS_REGION to the bucket's region",
}
_RENEW = "; renew the credentials, then run the same command"
_REQUEST = re.compile(
    r"Error performing [A-Z]+ (?P<url>(?P<host>\w+://[^/\s]*)\S*) in (?P<time>[\d.]+)(?P<unit>[^\d\s,]*s)"
    r"(?:, after (?P<retries>\d+) retries)?.*? - (?:Server returned non-2xx status code: "
    r"(?P<status>\d{3}) ?(?P<phrase>[^:]*))?(?P<body>.*)",
    re.DOTALL,
)
_CERTIFICATE = re.compile(r"InvalidCertificate\((?:\s*\w+\()*\s*(\w+)")
_KINDS = {"Connect": "no connection", "Timeout": "time is over", "Interrupted": "connection lost"}


def translated(error: Exception, url: str, doing: str) -> MilanError:
    """What went wrong with the file `url` while it was `doing`: read, written, listed or removed."""
    text = str(error)
    failed = f"{url} cannot be {doing}"
    scheme, _, rest = url.partition("://")
    if _NO_BUCKET.search(text):
        return StoreError(f"{failed}: there is no bucket {rest.partition('/')[0]}; make it, or correct its name")
    if isinstance(error, FileNotFoundError) and doing != "written":
        return MissingError(f"{url} is not there")
    if isinstance(error, PreconditionError):
        return StoreError(f"{failed}: it was replaced meanwhile; run again")
    if isinstance(error, NotSupportedError) and doing == "read":
        return StoreError(f"{failed}: its server does not send parts of files; copy it to a disk")
    return StoreError(f"{failed}: {resource_hint(error) or _reason(text, scheme)}")


def without_debug(text: str) -> str:
    """Text on one line, without the debug form that obstore adds."""
    return one_line(text.partition("Debug source:")[0].strip() or "no reason was given")


def _reason(text: str, scheme: str) -> str:
    message, _, debug = text.partition("Debug source:")
    request = _REQUEST.search(message)
    if request is None:
        return without_debug(message) + _cause(debug)
    if _ASKS_FOR_CREDENTIALS.search(request["url"]) and scheme in _HOW_TO_SIGN:
        return f"no credentials were found; {_HOW_TO_SIGN[scheme]}"
    seconds = f"{float(request['time']):.0f} s" if request["unit"] == "s" else "less than a second"
    tries = f" (tried {int(request['retries']) + 1} times in {seconds})" if request["retries"] else ""
    if request["status"] is None:
        return f"no answer from {request['host']}{_cause(debug)}{tries}"
    said = ": ".join(re.findall(r"<(?:Code|Message)>([^<]*)</", request["body"]))
    advice = _RENEW if "ExpiredToken" in said else _ADVICE.get(request["status"], "")
    if scheme == "hf" and request["status"] in ("401", "403"):
        advice = "; accept its terms on its page, and log in with `hf auth login` or set HF_TOKEN"
    answer = f"{request['host']} answered {request['status']} {request['phrase']}"
    return answer + (f", {without_debug(said)}" if said else "") + tries + advice


def _cause(debug: str) -> str:
    """The innermost words of a chain of errors, as "Connection refused"."""
    if certificate := _CERTIFICATE.search(debug):
        return f": its certificate is not accepted ({certificate[1]}); set SSL_CERT_FILE to that of its issuer"
    words = re.findall(r'(?:message|error): "([^"]+)"', debug)
    words = words or [_KINDS[kind] for kind in re.findall(r"kind: (Connect|Timeout|Interrupted)", debug)[:1]]
    return f": {without_debug(words[-1])}" if words else ""
