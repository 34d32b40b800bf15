"""Paths that cannot be used are one line that names them; what is written is whole or not there."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rights import as_nobody, private_folder

from coe_megatron.errors import ConfigError
from coe_megatron.files import (
    expand_user,
    is_plain_file,
    kind_of,
    new_file,
    read_limited,
    remove,
    require_file,
    require_folder,
    require_replaceable,
    require_writable,
    user_path,
    write_atomically,
)

LONG = "n" * 256


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with one of everything."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("content")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("/nowhere/at/all")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("folder")
    return tmp_path


@pytest.fixture
def private() -> Iterator[Path]:
    with private_folder() as folder:
        yield folder


def said(check: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(ConfigError) as error:
        check(*arguments)
    line = str(error.value)
    assert line.isprintable() and len(line) < 700
    return line


BAD = {
    "missing": "there is no such",
    "dangling": "it is a dangling link to /nowhere/at/all",
    "loop": "too many levels of symbolic links",
    "fifo": "it is a special file, where a",
    "file/below": "it cannot be used: not a directory",
    LONG: "it cannot be used: file name too long",
    "/".join(["d" * 200] * 30): "it cannot be used: file name too long",
    "a\0b": "it is not a valid path",
    "a\ud800b": "it is not a valid path",
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("check", [require_file, require_folder])
def test_what_is_no_file_and_no_folder(name: str, check: Callable[..., object], place: Path) -> None:
    line = said(check, place / name, "data.path")
    assert line.startswith("data.path is ") and BAD[name] in line


def test_a_file_is_no_folder_and_a_folder_no_file(place: Path) -> None:
    assert "it is a folder, where a file is needed" in said(require_file, place / "folder", "config")
    assert "it is a file, where a folder is needed" in said(require_folder, place / "file", "config")
    assert require_folder(place / "link", "config") == place / "link"
    assert require_file(place / "file", "config") == place / "file"
    assert kind_of(place / "missing", "config") is None


@pytest.mark.parametrize("name", ["dangling", "loop", "fifo", "file/below", "dangling/below", LONG, f"new/{LONG}"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_where_nothing_can_be_written(name: str, kind: str, place: Path) -> None:
    assert said(require_writable, place / name, "output", kind).startswith("output is ")
    assert not (place / "new").exists()


def test_where_something_can_be_written(place: Path) -> None:
    for kind, name in (("folder", "folder"), ("file", "file"), ("folder", "new/er"), ("file", "new/er/file")):
        require_writable(place / name, "output", kind)  # type: ignore[arg-type]
    require_writable(place / ("n" * 255), "output", "folder")
    assert "too long for a name" in said(require_writable, place / ("n" * 255), "output", "folder", 9)
    assert said(require_writable, place / "folder", "output", "file") and said(
        require_writable, place / "file", "output", "folder"
    )


def test_without_rights(private: Path) -> None:
    with as_nobody():
        for check in (kind_of, require_file, require_folder, lambda *of: require_writable(*of, "folder")):
            for name in ("d", "f", "new"):
                assert "permission denied" in said(check, private / name, "output")
        assert "it cannot be read: permission denied" in said(require_folder, private, "output")
        assert "cannot be written: permission denied" in said(
            require_writable, private.parent / "new", "output", "folder"
        )


def test_a_device_and_a_socket_are_not_read(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (Path("/dev/zero"), Path("/dev/stdin"), tmp_path / "socket"):
            assert said(read_limited, path, "config", 10).startswith("config is ")


def test_what_is_too_large_is_not_read(place: Path) -> None:
    assert read_limited(place / "file", "config", 7) == b"content"
    assert "more than 6 bytes" in said(read_limited, place / "file", "config", 6)


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user("~/runs/x") == "/home/me/runs/x" and user_path("~") == Path("/home/me")
    assert expand_user("runs/~x") == "runs/~x" and user_path("./~x") == Path("~x")
    assert "there is no such user" in said(expand_user, "~nobody-has-this-name/x")
    assert said(user_path, "")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor) or fsync(descriptor))
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and len(synced) == 2  # the file before its name, and the folder
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "newer")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["run.json"]


def test_what_is_left_beside_is_neither_opened_nor_followed(tmp_path: Path) -> None:
    path, left, other = tmp_path / "run.json", tmp_path / "run.json.tmp", tmp_path / "other"
    other.write_text("somebody's")
    makers: list[Callable[[], object]] = [
        lambda: os.mkfifo(left),
        lambda: left.symlink_to(other),
        lambda: left.symlink_to("/nowhere/at/all"),
        lambda: left.symlink_to(left.name),
        lambda: left.write_text("a longer text that an attempt has left"),
    ]
    for number, leave in enumerate(makers):
        leave()
        write_atomically(path, str(number))
        assert path.read_text() == str(number) and is_plain_file(path)
    assert other.read_text() == "somebody's" and sorted(os.listdir(tmp_path)) == ["other", "run.json"]


def test_a_folder_beside_is_named_and_stays(tmp_path: Path) -> None:
    path, left = tmp_path / "Run.json", tmp_path / "Run.json.tmp"
    left.mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_atomically(path, "new")
    assert error.value.strerror == "the folder Run.json.tmp is in the way, remove it"
    line = said(require_replaceable, path, "--json")
    assert line == f"--json is {path}: it cannot be used: the folder Run.json.tmp is in the way, remove it"
    assert os.listdir(tmp_path) == ["Run.json.tmp"]
    left.rmdir()
    assert require_replaceable(path, "--json") == path
    assert "too long for a name" in said(require_replaceable, tmp_path / ("n" * 255), "--json")


def test_a_new_file_has_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with new_file(tmp_path / "new") as file:
        file.write(b"new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_whatever_is_at_a_path_is_removed_and_no_more(place: Path) -> None:
    (place / "folder" / "inside").mkdir()
    assert [is_plain_file(place / name) for name in ("file", "link", "fifo", "folder", "new")] == [True] + [False] * 4
    remove(place / "link")
    assert (place / "folder" / "inside").is_dir()
    for name in ("folder", "file", "fifo", "dangling", "loop", "new"):
        remove(place / name)
    assert os.listdir(place) == []
