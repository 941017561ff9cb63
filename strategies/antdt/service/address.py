"""Address of a server: host, port and token, in a file of its folder that only the owner may read."""

import json
import os
import stat
from pathlib import Path
from typing import NamedTuple

__all__ = ["SERVER_FILE", "Address"]

SERVER_FILE = "server.json"


class Address(NamedTuple):
    """Host, port and token of a server.

    Attributes:
        host: name or number.
        port: of TCP.
        token: that every request must carry.
        pid: its process; 0 if unknown.
        hostname: of the machine it runs on; empty if unknown.
    """

    host: str
    port: int
    token: str
    pid: int = 0
    hostname: str = ""

    @classmethod
    def parse(cls, text: str, token: str) -> "Address":
        """From ``host:port``.

        Raises:
            ValueError: it is not that, or the token is empty.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"server is {text!r}; it must be host:port, such as node0:28777.")
        if not token:
            raise ValueError(f"server {text}: give its token in $ANTDT_TOKEN; it is in {SERVER_FILE} of the server's folder.")
        return cls(host.strip("[]"), int(port), token)

    @classmethod
    def read(cls, folder: Path) -> "Address | None":
        """That of the server that has written into a folder; None if there is none, or it is half written.

        Raises:
            PermissionError: others can read or have written the file, and with it the token.
        """
        path = folder / SERVER_FILE
        try:
            with path.open() as stream:
                status = os.fstat(stream.fileno())
                if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
                    raise PermissionError(f"{path} must belong to you and be readable by you only (chmod 600 {path}).")
                content = json.load(stream)
            return cls(content["host"], int(content["port"]), content["token"], int(content["pid"]), content["hostname"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
