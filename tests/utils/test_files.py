"""Files are written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfspec import InputError
from selfspec.utils.files import check_writable, is_stream, read_bounded, write_atomically


@pytest.mark.parametrize("method", ["chmod", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    write_atomically(path, "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, method, full)
    with pytest.raises(InputError, match=r"cannot write .*plan\.json: No space left on device; choose a writable"):
        write_atomically(path, "new" * 100_000)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_an_interrupt_while_writing_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "plan.json", "new")
    assert os.listdir(tmp_path) == []


# --- What is never replaced ---


def test_a_pipe_is_written_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert is_stream(pipe)
    check_writable(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "new")
    assert os.read(reader, 99) == b"new"
    os.close(reader)
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_pipe_without_a_reader_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="nothing reads this pipe"):
        write_atomically(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo()


def test_a_device_is_written_and_stays_a_device(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert Path("/dev/null").is_char_device()
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left on device"):
        write_atomically(tmp_path / "full", "new")


def test_a_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "plan.json", tmp_path / "link"
    link.symlink_to(target)
    for text in ("new", "newer"):  # a dangling link, then an existing file
        write_atomically(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert os.listdir(tmp_path / "there") == ["plan.json"]


def test_a_loop_of_symlinks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(tmp_path / "a", "new")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("stdout", ["file", "pipe", "closed"])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "link"])
def test_stdout_is_written_in_order_with_what_is_printed(stdout: str, name: str, tmp_path: Path) -> None:
    """In a process of its own, since pytest exchanges stdout."""
    (tmp_path / "link").symlink_to("/proc/self/fd/1")
    code = "\n".join(
        [
            "import sys; from selfspec.utils.files import write_atomically, is_stdout",
            "from selfspec.errors import InputError",
            "if sys.argv[2] == 'closed':",
            "    import os; os.close(1)",
            "else: print('before')",
            "try: write_atomically(sys.argv[1], 'content\\n')",
            "except InputError as error: sys.exit(str(error))",
            "print('after', is_stdout(sys.argv[1]))",
        ]
    )
    path = str(tmp_path / "link") if name == "link" else name
    command = [sys.executable, "-c", code, path, stdout]
    if stdout == "file":
        with (tmp_path / "out").open("wb") as out:
            subprocess.run(command, stdout=out, check=True)
        printed = (tmp_path / "out").read_text()
    else:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if stdout == "closed":
            assert done.stderr.startswith("cannot write ")
            return
        printed = done.stdout
    assert printed == "before\ncontent\nafter True\n"


# --- Permissions ---


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_follows_the_umask_and_an_old_file_keeps_its_permissions(mask: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    before = os.umask(mask)
    try:
        write_atomically(path, "new")
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
        path.chmod(0o640)
        write_atomically(path, "newer")
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_long_name_is_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("é" * 127), "new")
    assert len(os.listdir(tmp_path)) == 1


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    assert write_atomically(tmp_path / "figure.png", b"\x89PNG\r\n").read_bytes() == b"\x89PNG\r\n"


@pytest.mark.parametrize("path", ["none/plan.json", "folder", "file/plan.json", "x" * 300, "null\0character"])
def test_what_cannot_be_written_is_said_in_one_line(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write") as caught:
        write_atomically(tmp_path / path, "new")
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_the_check_finds_what_the_writing_would_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"there is no directory .*none; make it first"):
        check_writable(tmp_path / "none" / "plan.json")
    with pytest.raises(InputError, match="it is a directory; choose a file"):
        check_writable(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "none" / "plan.json")
    with pytest.raises(InputError, match="there is no directory"):
        check_writable(tmp_path / "dangling")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(InputError, match="choose a file and a directory that are writable"):
        check_writable(tmp_path / "plan.json")


# --- Reading ---


def test_reading_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5, "it") == b"12345"
    with pytest.raises(InputError, match="it is larger than 4 B; give another file"):
        read_bounded(path, 4, "it")
    with pytest.raises(InputError, match="it is a device; give a file"):
        read_bounded("/dev/zero", 4, "it")
