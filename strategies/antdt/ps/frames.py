"""Messages with tensors between workers and parameter servers: lengths, a JSON header, and raw bytes; nothing is unpickled.

A frame is ``>IQ`` (bytes of the header, bytes of the body), the header, and the body, in which each tensor that the header lists
under ``tensors`` as ``[dtype, shape]`` begins at a multiple of eight bytes.
"""

import asyncio
import json
import math
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategies.antdt.service.wire import MessageTooLarge, ServiceError, WireError

__all__ = ["HEADER_LIMIT", "STRANGER_LIMIT", "Connection", "Frame", "FrameProtocol", "encode_frame", "pack", "unpack"]

STRANGER_LIMIT = 2**16
"""Largest frame, in bytes, from someone who has not shown the token."""
HEADER_LIMIT = 2**24
"""Largest header, in bytes: names and shapes of all parameters of a large model fit."""

_LENGTHS = struct.Struct(">IQ")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
                  torch.uint8, torch.bool, torch.complex64, torch.complex128)
}  # fmt: skip


class Frame(NamedTuple):
    """A message.

    Attributes:
        header: what it says.
        tensors: what it carries, on the CPU.
    """

    header: dict[str, Any]
    tensors: list[Tensor]


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    raw: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(raw)


def encode_frame(header: dict[str, Any], tensors: Sequence[Tensor] = (), limit: int | None = None) -> list[memoryview | bytes]:
    """A frame as buffers to be written one after another; tensors on the CPU are not copied.

    Args:
        header: JSON types; ``tensors`` is added.
        tensors: of any shape.
        limit: most bytes of header and body.

    Raises:
        MessageTooLarge: it has more.
        TypeError: a dtype that does not travel, or a header that is no JSON.
    """
    described: list[Any] = []
    buffers: list[memoryview | bytes] = []
    size = 0
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise TypeError(f"a tensor of {tensor.dtype} cannot be sent; there are {', '.join(_DTYPES)}.")
        described.append([name, list(tensor.shape)])
        data = _bytes(tensor)
        padding = -len(data) % 8
        buffers += [data, bytes(padding)] if padding else [data]
        size += len(data) + padding
    body = json.dumps({**header, "tensors": described}, separators=(",", ":")).encode()
    body += b" " * (-(len(body) + _LENGTHS.size) % 8)
    _check_size(len(body), size, limit)
    return [_LENGTHS.pack(len(body), size) + body, *buffers]


def _check_size(header: int, body: int, limit: int | None) -> None:
    if header > HEADER_LIMIT:
        raise MessageTooLarge(f"a header of {header} bytes is larger than the limit of {HEADER_LIMIT} bytes.")
    if limit is not None and header + body > limit:
        raise MessageTooLarge(f"a frame of {header + body} bytes is larger than the limit of {limit} bytes.")


def _decode(header: memoryview, body: bytearray) -> Frame:
    try:
        content = json.loads(bytes(header))
        described = content.pop("tensors")
        tensors, start = [], 0
        for name, shape in described:
            dtype, count = _DTYPES[name], math.prod(int(size) for size in shape)
            if count < 0 or any(size < 0 for size in shape):
                raise ValueError(f"shape {shape}")
            size = count * dtype.itemsize
            if start + size > len(body):
                raise ValueError(f"{start + size} bytes of tensors in a body of {len(body)}")
            flat = torch.frombuffer(body, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)
            tensors.append(flat.view(shape))
            start += size + -size % 8
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise WireError(f"what came is no frame of this protocol ({cause}); is this port another service's?") from cause
    if not isinstance(content, dict):
        raise WireError("the header of a frame must be a JSON object.")
    return Frame(content, tensors)


class _Assembler:
    """Puts frames together from pieces of a stream, which are written where they belong."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._begin()

    def _begin(self) -> None:
        self._lengths: tuple[int, int] | None = None
        self._parts: list[bytearray] = [bytearray(_LENGTHS.size)]
        self._filled = 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return memoryview(self._parts[-1])[self._filled :]

    def filled(self, count: int) -> Frame | None:
        """So many bytes have come; the frame, if that was its end."""
        self._filled += count
        while self._filled == len(self._parts[-1]):
            self._filled = 0
            if self._lengths is None:
                header, body = _LENGTHS.unpack(self._parts.pop())
                _check_size(header, body, self.limit)
                self._lengths = header, body
                self._parts.append(bytearray(header))
            elif len(self._parts) == 1:
                self._parts.append(bytearray(self._lengths[1]))
            else:
                frame = _decode(memoryview(self._parts[0]), self._parts[1])
                self._begin()
                return frame
        return None


class FrameProtocol(asyncio.BufferedProtocol):
    """The server's end of a connection.

    Args:
        received: called with this and each frame.
        lost: called with this when the connection has closed.
        refused: called with this and what was wrong with bytes that are no frame; the connection is closed then.
        limit: largest frame, in bytes; may be changed.

    Attributes:
        about: whatever the server keeps with a connection.
    """

    def __init__(
        self,
        received: Callable[["FrameProtocol", Frame], None],
        lost: Callable[["FrameProtocol"], None],
        limit: int = STRANGER_LIMIT,
    ) -> None:
        self._received, self._lost = received, lost
        self._assembler = _Assembler(limit)
        self.transport: asyncio.Transport | None = None
        self.about: Any = None

    @property
    def limit(self) -> int:
        """Largest frame, in bytes."""
        return self._assembler.limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._assembler.limit = limit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        peer = transport.get_extra_info("socket")
        if peer is not None:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's."""
        self._lost(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Asyncio's."""
        return self._assembler.space()

    def buffer_updated(self, nbytes: int) -> None:
        """Asyncio's."""
        try:
            frame = self._assembler.filled(nbytes)
        except WireError as refusal:
            self.refuse("too_large" if isinstance(refusal, MessageTooLarge) else "bad_request", str(refusal))
            return
        if frame is not None:
            self._received(self, frame)

    def send(self, header: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Answer; what is sent to a connection that is gone is lost."""
        if self.transport is not None and not self.transport.is_closing():
            # One buffer: tensors of the server may change before the socket has taken them.
            self.transport.write(b"".join(encode_frame(header, tensors)))

    def deny(self, kind: str, message: str) -> None:
        """Answer that a request is refused, of which `Connection.receive` makes a ``ServiceError``."""
        self.send({"error": {"kind": kind, "message": message}})

    def refuse(self, kind: str, message: str) -> None:
        """Say what is wrong, and close."""
        self.deny(kind, message)
        if self.transport is not None:
            self.transport.close()


class Connection:
    """A worker's end of a connection: blocking, one request after another.

    Args:
        host: of the server.
        port: of the server.
        limit: largest frame, in bytes, either way.
        timeout: seconds to wait for the connection.

    Raises:
        OSError: nobody listens there.
    """

    def __init__(self, host: str, port: int, limit: int, timeout: float = 5.0) -> None:
        self._limit = limit
        self._assembler = _Assembler(limit)
        self._socket = socket.create_connection((host, port), timeout=timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent = self.received = 0

    def send(self, header: dict[str, Any], tensors: Sequence[Tensor] = (), wait: float | None = 30.0) -> None:
        """Send a request.

        Raises:
            OSError: the connection is gone.
            MessageTooLarge: it is larger than the limit.
        """
        buffers = encode_frame(header, tensors, self._limit)
        self._socket.settimeout(wait)
        for buffer in buffers:
            self._socket.sendall(buffer)
            self.sent += len(buffer)

    def receive(self, wait: float | None = 30.0) -> Frame:
        """The answer.

        Raises:
            OSError: the connection is gone, or nothing came for ``wait`` seconds.
            ServiceError: the server refuses.
            WireError: what came is no frame.
        """
        self._socket.settimeout(wait)
        while True:
            count = self._socket.recv_into(self._assembler.space())
            if count == 0:
                raise ConnectionResetError("the connection was closed")
            self.received += count
            frame = self._assembler.filled(count)
            if frame is not None:
                if "error" in frame.header:
                    raise ServiceError(frame.header["error"]["kind"], frame.header["error"]["message"])
                return frame

    def close(self) -> None:
        """Close it."""
        self._socket.close()


_TENSOR = "__tensor__"


def pack(value: Any) -> tuple[Any, list[Tensor]]:
    """Plain data and tensors, in lists and dictionaries, as JSON types and a list of tensors; `unpack` undoes it.

    Raises:
        TypeError: something else is in it.
    """
    tensors: list[Tensor] = []

    def visit(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors.append(part)
            return {_TENSOR: len(tensors) - 1}
        if isinstance(part, dict):
            if not all(isinstance(key, str) for key in part):
                return {"__items__": [[visit(key), visit(item)] for key, item in part.items()]}
            return {key: visit(item) for key, item in part.items()}
        if isinstance(part, tuple):
            return {"__tuple__": [visit(item) for item in part]}
        if isinstance(part, list):
            return [visit(item) for item in part]
        if part is None or isinstance(part, bool | int | float | str):
            return part
        raise TypeError(f"{type(part).__name__} cannot be sent to other processes: only numbers, text, tensors, and lists and"
                        " dictionaries of them.")  # fmt: skip

    return visit(value), tensors


def unpack(value: Any, tensors: Sequence[Tensor]) -> Any:
    """What `pack` has packed."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if value.keys() == {"__tuple__"}:
            return tuple(unpack(item, tensors) for item in value["__tuple__"])
        if value.keys() == {"__items__"}:
            return {unpack(key, tensors): unpack(item, tensors) for key, item in value["__items__"]}
        return {key: unpack(item, tensors) for key, item in value.items()}
    return value
