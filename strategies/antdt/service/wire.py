"""Messages between workers and the service: four bytes of length, most significant first, and a JSON object in UTF-8."""

import hmac
import json
import struct
from collections.abc import Iterator
from typing import Any

__all__ = [
    "AUTHENTICATED_LIMIT",
    "LIMIT",
    "Decoder",
    "MessageTooLarge",
    "ServiceError",
    "WireError",
    "encode",
    "error",
    "same_token",
]

LIMIT = 2**20
"""Largest message, in bytes, from someone who has not shown the token."""
AUTHENTICATED_LIMIT = 2**26
"""Largest message between those who share the token: a checkpoint of the controller of ten thousand nodes fits."""

_LENGTH = struct.Struct(">I")


class WireError(ValueError):
    """The data received is not a message; the connection must be closed."""


class MessageTooLarge(WireError):
    """A message is longer than its reader allows."""


class ServiceError(RuntimeError):
    """The service refuses a request.

    Attributes:
        kind: ``token``, ``stale``, ``other_dataset``, ``conflict``, ``not_configured``, ``bad_request``, ``timeout``,
            ``too_large`` or ``internal``.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def encode(message: dict[str, Any], limit: int = AUTHENTICATED_LIMIT) -> bytes:
    """One message as bytes.

    Raises:
        MessageTooLarge: it has more than ``limit`` bytes.
        ValueError: a number is not finite, which JSON does not know.
    """
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > limit:
        raise MessageTooLarge(f"a message of {len(body)} bytes is larger than the limit of {limit} bytes.")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Cuts a stream of bytes into messages.

    Args:
        limit: largest message, in bytes; may be changed while it reads.

    Example:
        >>> decoder = Decoder()
        >>> data = encode({"op": "status"})
        >>> [*decoder.feed(data[:5]), *decoder.feed(data[5:])]
        [{'op': 'status'}]
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Take bytes, give the messages that are complete now.

        Raises:
            MessageTooLarge: the length that is announced is above the limit; nothing of it is kept.
            WireError: it is no JSON object.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self.limit:
                self._buffer.clear()
                raise MessageTooLarge(f"a message of {length} bytes is larger than the limit of {self.limit} bytes.")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = json.loads(body)
            except (ValueError, RecursionError) as cause:
                raise WireError("what came is no JSON; is this port another service's?") from cause
            if not isinstance(message, dict):
                raise WireError("a message must be a JSON object.")
            yield message


def same_token(given: object, expected: str) -> bool:
    """Whether a token is the right one, in a time that does not tell how much of it is."""
    return isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())


def error(kind: str, message: str) -> dict[str, Any]:
    """The answer to a request that is refused."""
    return {"error": {"kind": kind, "message": message}}
