from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from fat.utils.errors import FatError
from fat.utils.io import check_writable, torn_part, write_atomic, write_json, write_text


def test_makes_folders_and_returns_the_place(tmp_path: Path) -> None:
    target = tmp_path / "a/b/c.bin"
    assert write_atomic(target, lambda path: path.write_bytes(b"\0\1")) == target
    assert target.read_bytes() == b"\0\1"
    assert write_text(str(target), "ü") == target
    assert target.read_bytes() == "ü".encode()
    assert os.listdir(target.parent) == ["c.bin"]


def test_a_reader_sees_the_old_content_until_the_new_is_whole(tmp_path: Path) -> None:
    target = write_text(tmp_path / "x.txt", "old")
    seen = []

    def write(path: Path) -> None:
        path.write_text("half")
        seen.append(target.read_text())
        assert path.parent == target.parent  # else the replacement is not atomic
        path.write_text("whole")

    write_atomic(target, write)
    assert seen == ["old"]
    assert target.read_text() == "whole"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space")])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    target = write_text(tmp_path / "x.txt", "old")

    def write(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(FatError if isinstance(error, OSError) else type(error)):
        write_atomic(target, write)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_failing_writer_of_a_new_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_atomic(tmp_path / "x.txt", lambda path: 1 / 0)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_says_what_and_where(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        raise OSError(28, "No space left on device")

    wanted = r"Cannot write .*x\.txt: No space left on device\. Choose another place\."
    with pytest.raises(FatError, match=wanted):
        write_atomic(tmp_path / "x.txt", write)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    # Under a regular file, since the tests may run as root, who may write anywhere else.
    (tmp_path / "file").write_text("x")
    for place in ("file/x.txt", "file/deeper/x.txt"):
        with pytest.raises(FatError, match=r"Cannot write .*x\.txt: .*Choose another place\."):
            write_text(tmp_path / place, "y")
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_is_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(FatError, match="Cannot write"):
        write_text(tmp_path / "x.txt", "y")
    assert os.listdir(tmp_path) == ["x.txt"]
    assert (tmp_path / "x.txt").is_dir()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_rights_are_those_of_any_other_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        own = write_text(tmp_path / "own", "x")
        (tmp_path / "other").write_text("x")
    finally:
        os.umask(before)
    rights = [stat.S_IMODE(path.stat().st_mode) for path in (own, tmp_path / "other")]
    assert rights[0] == rights[1] == 0o666 & ~mask


def test_json_is_strict_and_readable(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None], "ü": "ä"}
    target = write_json(tmp_path / "x.json", content)
    assert json.loads(target.read_text()) == content
    assert len(target.read_text().splitlines()) > 3
    assert target.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"a": float("nan")})
    assert json.loads(target.read_text()) == content
    assert os.listdir(tmp_path) == ["x.json"]


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(FatError, match=r"Cannot write .*Choose another place"):
        check_writable(tmp_path / "file")


def test_a_name_that_is_no_text_is_written_as_an_escape(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "cat\udcff.png")
    assert (tmp_path / "x").read_bytes() == b"cat\\udcff.png"


def test_a_zip_is_compared_with_its_checksums(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.arange(1000)}, path)
    assert torn_part(path) == ""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torn_part(path).endswith("data/0")
    path.write_bytes(b"no zip")
    assert torn_part(path) == ""
