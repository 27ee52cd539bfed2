"""A PostgreSQL server for tests, in a temporary directory and on a free port."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

UNPRIVILEGED = ("postgres", "nobody")
"""Users: PostgreSQL refuses to run as root, so tests that run as root start the server as one of these users."""


class Server:
    """A PostgreSQL server that can be stopped and started."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._binaries = binaries
        self._data = directory / "data"
        self._directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self._databases = 0
        self._run("initdb", "-D", str(self._data), "-U", "tester", "--auth=trust", "--no-sync", "-E", "UTF8")

    @property
    def url(self) -> str:
        return f"postgresql://tester:secret@127.0.0.1:{self._port}/postgres"

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        name = f"empty_{self._databases}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url.removesuffix("postgres") + name

    def start(self) -> None:
        where = f"-k {self._directory} -p {self._port} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self._directory / "log")
        self._run("pg_ctl", "start", "-w", "-D", str(self._data), "-l", log, "-o", where)

    def stop(self) -> None:
        """Stop the server and close all connections at once."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", str(self._data))

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._binaries / program), *arguments],
            check=True,
            cwd=self._directory,
            user=_user(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A running server. Without PostgreSQL, tests are skipped, but in CI they fail."""
    binaries = _binaries()
    if binaries is None:
        message = "PostgreSQL's initdb and pg_ctl are not installed"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(message)
        pytest.skip(message)
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as name:  # the length of a socket's path is limited
        directory = Path(name)
        if (user := _user()) is not None:
            os.chown(directory, pwd.getpwnam(user).pw_uid, -1)
        server = Server(binaries, directory)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _user() -> str | None:
    """The user that runs the server; None for the user that runs the tests."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in UNPRIVILEGED if name in names) if os.geteuid() == 0 else None


def _binaries() -> Path | None:
    """The directory of `initdb` and `pg_ctl`. Debian has one for each release, and none of them is on the PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("pg_ctl"):
        places.insert(0, Path(found).resolve().parent)
    return next((place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None)
