"""The connections of process groups, to be cut when a member is lost.

A rank that waits for a lost one gets an error. A rank that waits for one that has got an error does not: it would wait until the
time-out of its group, half an hour. So whoever leaves a broken group cuts its connections, which those who wait for it notice.
torch offers no way to do so (a group that is destroyed keeps its connections as long as anything refers to it), the operating
system does: shutting sockets down ends what waits for them on both sides.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = ["GlooLinks"]

_OPEN = Path("/proc/self/fd")


class GlooLinks:
    """Remembers connections that were opened while groups were made.

    Example:
        >>> import socket
        >>> links = GlooLinks()
        >>> with links.remembered():
        ...     one, other = socket.socketpair()
        >>> links.cut()
        >>> one.recv(1)
        b''
    """

    def __init__(self) -> None:
        self._links: dict[int, str] = {}

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """Sockets that are opened inside, by any thread, are connections of the group."""
        before = _sockets()
        yield
        self._links |= {number: name for number, name in _sockets().items() if before.get(number) != name}

    def cut(self) -> None:
        """End all of them, for both sides; callable from any thread."""
        links, self._links = self._links, {}
        for number, name in links.items():
            with contextlib.suppress(OSError):  # gloo has closed it
                copy = os.dup(number)
                if _name(copy) != name:  # the number is another file's now
                    os.close(copy)
                    continue
                with socket.socket(fileno=copy) as link:
                    # A listening socket must stay: gloo ends the process when that breaks.
                    if not link.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        link.shutdown(socket.SHUT_RDWR)


def _sockets() -> dict[int, str]:
    """Number and name of each socket of this process."""
    found = {int(file.name): _name(int(file.name)) for file in _OPEN.iterdir()}
    return {number: name for number, name in found.items() if name.startswith("socket:")}


def _name(number: int) -> str:
    try:
        return str((_OPEN / str(number)).readlink())
    except OSError:
        return ""
