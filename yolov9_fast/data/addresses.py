"""Addresses of streams: what is one, and how it is shown without the passwords in it."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SECRET = re.compile(
    r"((?:pass|passwd|password|pwd|token|secret|signature|sig|auth|api_?key|key)=)[^&;/#\s]+", re.IGNORECASE
)


def is_address(source: str) -> bool:
    """Whether `source` begins with a scheme such as `rtsp://`."""
    return _ADDRESS.match(source) is not None


def without_password(source: str) -> str:
    """An address without its user and password, and with `***` for passwords and tokens among its parameters.

    Anything that is no address is returned as it is.
    """
    scheme = _ADDRESS.match(source)
    if scheme is None:
        return source
    rest = source[scheme.end() :]
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # In a password people write /, ? and # as they are.
    secret_end = host.rfind("@") if "@" in host else rest.rfind("@") if ":" in host else -1
    return scheme[0] + _SECRET.sub(r"\1***", rest[secret_end + 1 :])
