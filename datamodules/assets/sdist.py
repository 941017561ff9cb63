"""Download a source distribution through pip's own finder and session, without building it.

Run as a program, in a process of its own: ``python sdist.py PACKAGE FILENAME DESTINATION``. ``pip download`` would run
the distribution's ``setup.py`` to prepare its metadata; here pip only looks the file up, in the index, with the proxy,
certificates and credentials it is configured for, and its session streams the file to disk. The names below are
internal to pip (there is no public command that does this); ``tests/datamodules/test_assets.py`` shows that they hold,
and where they do not, the caller tells the user to place the file by hand.
"""

import sys
from pathlib import Path
from typing import Any


def download(package: str, filename: str, destination: Path) -> None:
    """Download one file of a package.

    Args:
        package: Name of the package on the index.
        filename: Name of the file to take.
        destination: Path to write to.

    Raises:
        FileNotFoundError: The configured indexes have no such file.
    """
    from pip._internal.commands import create_command

    command: Any = create_command("download")
    options, _ = command.parse_args(["--no-deps", "--no-binary=:all:", "--ignore-requires-python", package])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session, ignore_requires_python=True)
        for candidate in finder.find_all_candidates(package):
            if candidate.link.filename == filename:
                address = candidate.link.url_without_fragment
                # identity: a server must not decompress the .gz on the way
                with session.get(address, headers={"Accept-Encoding": "identity"}, stream=True) as answer:
                    answer.raise_for_status()
                    with destination.open("wb") as file:
                        for chunk in answer.iter_content(1 << 20):
                            file.write(chunk)
                return
    raise FileNotFoundError(f"the package index offers no file {filename}")


if __name__ == "__main__":
    try:
        download(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except Exception as error:
        sys.exit(f"error: {type(error).__name__}: {error}")
