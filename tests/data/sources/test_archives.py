from __future__ import annotations

import gzip
import io
import multiprocessing
import os
import pickle
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from fat.data.sources import archives
from fat.data.sources.archives import Place, Reader, parquet_rows, tar_members
from fat.utils.errors import FatError
from tests.data.fake_imagenet import need, pack, put, write_parquet

FILES = [("a.txt", b"first"), ("deep/b.bin", bytes(range(256)) * 9), ("c", b""), ("d", b"last")]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    pack(tmp_path / "x.tar", FILES)
    return tmp_path / "x.tar"


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    need("parquet")
    write_parquet(tmp_path / "x.parquet", [(f"{i}.JPEG", i % 3, b"%d" % i) for i in range(20)], 6)
    return tmp_path / "x.parquet"


def read_tar(path: Path, start: int = 0) -> list[tuple[str, bytes]]:
    reader = Reader(path.parent)
    return [
        (member.name, reader.read(Place(path.name, member.offset, member.size)))
        for member in tar_members(path, start)
    ]


# --------------------------------------------------------------------------------------------- tar


def test_members_are_where_tarfile_finds_them(tar: Path) -> None:
    assert read_tar(tar) == FILES
    with tarfile.open(tar) as whole:
        assert [m.offset for m in tar_members(tar)] == [m.offset_data for m in whole.getmembers()]


def test_only_files_count(tmp_path: Path) -> None:
    put(tmp_path / "in/folder/a.jpg", "picture")
    (tmp_path / "in/link.jpg").symlink_to("folder/a.jpg")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "in", "in")
    assert read_tar(tmp_path / "x.tar") == [("in/folder/a.jpg", b"picture")]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_names(tmp_path: Path, form: int) -> None:
    name = "folder/" * 30 + "ü" * 60 + ".jpg"
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert read_tar(tmp_path / "x.tar") == [(name, b"abc")]


def test_tar_in_tar(tmp_path: Path) -> None:
    inner = io.BytesIO()
    pack(inner, FILES)
    pack(tmp_path / "x.tar", [("first.tar", inner.getvalue()), ("second.tar", inner.getvalue())])
    outer = list(tar_members(tmp_path / "x.tar"))
    assert [member.name for member in outer] == ["first.tar", "second.tar"]
    for member in outer:
        assert read_tar(tmp_path / "x.tar", member.offset) == FILES


def test_a_tar_in_a_tar_without_an_end(tmp_path: Path) -> None:
    inner = io.BytesIO()
    pack(inner, FILES)
    cut = list(tar_members_of(tmp_path, inner.getvalue()))[-1].offset + 512
    pack(tmp_path / "x.tar", [("1.tar", inner.getvalue()[:cut]), ("2.tar", inner.getvalue())])
    first, _ = tar_members(tmp_path / "x.tar")
    found = tar_members(tmp_path / "x.tar", first.offset, first.size)
    assert [next(found).name for _ in FILES] == [name for name, _ in FILES]
    with pytest.raises(FatError, match=r"the tar at byte 512 in it\) is damaged after 4 members"):
        next(found)


def tar_members_of(folder: Path, content: bytes) -> list[archives.Member]:
    put(folder / "inner.tar", content)
    return list(tar_members(folder / "inner.tar"))


def test_empty_tar(tmp_path: Path) -> None:
    pack(tmp_path / "x.tar", [])
    assert read_tar(tmp_path / "x.tar") == []


def test_compressed_tar_is_refused(tar: Path) -> None:
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(FatError, match=r"x.tar is compressed \(gzip\).*Decompress.*tar xf"):
        read_tar(tar)


def test_damaged_tar_names_how_far_it_was_good(tar: Path) -> None:
    whole = tar.read_bytes()
    offsets = [member.offset for member in tar_members(tar)]
    # Truncated in the second member, in its header, between members, and before the final zeros.
    for cut in (offsets[1] + 10, offsets[1] - 100, offsets[1] - 512, offsets[3] + 512):
        tar.write_bytes(whole[:cut])
        with pytest.raises(FatError, match=r"x.tar is damaged after \d members: .*download it"):
            read_tar(tar)
    broken = bytearray(whole)
    broken[offsets[3] - 512 : offsets[3] - 400] = b"\xff" * 112
    tar.write_bytes(broken)
    with pytest.raises(FatError, match="damaged after 3 members"):
        read_tar(tar)
    tar.write_bytes(b"<html>no such file</html>")
    with pytest.raises(FatError, match="damaged after 0 members"):
        read_tar(tar)


def test_listing_a_tar_takes_constant_memory(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        pack(tmp_path / f"{count}.tar", ((f"{i}.jpg", b"") for i in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in tar_members(tmp_path / f"{count}.tar")) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(2000) < peak(200) + 50_000


def test_open_files_are_few(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for _ in range(2):
        for i in range(100):
            pack(tmp_path / f"{i}.tar", [("a", b"%d" % i)])
            (member,) = tar_members(tmp_path / f"{i}.tar")
            place = Place(f"{i}.tar", member.offset, member.size)
            assert reader.read(place) == b"%d" % i
            assert reader.read(place) == b"%d" % i
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) - before <= 40


# ----------------------------------------------------------------------------------------- parquet


def test_parquet_rows_and_reading_them(parquet: Path) -> None:
    rows = list(parquet_rows(parquet))
    assert rows == [(i, f"{i}.JPEG", i % 3) for i in range(20)]
    reader = Reader(parquet.parent)
    for row in (0, 19, 5, 6, 7, 11, 12):
        assert reader.read(Place("x.parquet", row=row)) == b"%d" % row
    with pytest.raises(OSError, match="row 20 of 20"):
        reader.read(Place("x.parquet", row=20))
    with pytest.raises(FileNotFoundError):
        reader.read(Place("y.parquet", row=0))


def test_a_row_group_is_read_once(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []
    read = archives._row_group

    def count(arrow: object, path: Path, row: int) -> object:
        groups.append(row // 6)
        return read(arrow, path, row)

    monkeypatch.setattr(archives, "_row_group", count)
    reader = Reader(parquet.parent)
    for row in range(20):
        reader.read(Place("x.parquet", row=row))
    assert groups == [0, 1, 2, 3]


def test_parquet_without_names_or_labels(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    table = {"image": pyarrow.array([{"bytes": b"x"}]), "label": pyarrow.array([None], "int64")}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    assert list(parquet_rows(tmp_path / "x.parquet")) == [(0, "", -1)]
    none = {"image": pyarrow.array([None], table["image"].type), "label": [0]}
    pyarrow.parquet.write_table(pyarrow.table(none), tmp_path / "x.parquet")
    with pytest.raises(OSError, match="row 0 holds no image"):
        Reader(tmp_path).read(Place("x.parquet", row=0))


def test_damaged_and_other_parquet(parquet: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    parquet.write_bytes(parquet.read_bytes()[:-20])
    with pytest.raises(FatError, match=r"x.parquet cannot be read as parquet.*download it again"):
        list(parquet_rows(parquet))
    with pytest.raises(OSError, match=r"[Pp]arquet"):
        Reader(parquet.parent).read(Place("x.parquet", row=0))
    pyarrow.parquet.write_table(pyarrow.table({"img": [b"x"], "label": [1]}), parquet)
    with pytest.raises(FatError, match=r"columns img \(binary\), label \(int64\); expected"):
        list(parquet_rows(parquet))


def test_without_pyarrow(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives.importlib.util, "find_spec", lambda name: None)
    for use in (
        lambda: list(parquet_rows(parquet)),
        lambda: Reader(parquet.parent).read(Place("x.parquet", row=0)),
    ):
        with pytest.raises(FatError, match=r"pyarrow.*pip install -e '\.\[parquet\]'"):
            use()


# --------------------------------------------------------------------------------------- processes


def test_pickling_drops_what_is_open(tar: Path, parquet: Path) -> None:
    reader = Reader(tar.parent)
    member = list(tar_members(tar))[1]
    places = [Place("x.tar", member.offset, member.size), Place("x.parquet", row=3)]
    first = [reader.read(place) for place in places]
    assert [pickle.loads(pickle.dumps(reader)).read(place) for place in places] == first
    assert len(pickle.dumps(reader)) < 500


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_reads_the_same(tar: Path, parquet: Path) -> None:
    reader = Reader(tar.parent)
    places = [Place("x.tar", m.offset, m.size) for m in tar_members(tar)]
    places += [Place("x.parquet", row=row) for row in range(20)]
    expected = [reader.read(place) for place in places]
    context = multiprocessing.get_context("fork")

    def child(pipe: multiprocessing.connection.Connection) -> None:  # type: ignore[name-defined]
        pipe.send([[reader.read(place) for place in places] for _ in range(20)])

    pipes = [context.Pipe() for _ in range(2)]
    workers = [context.Process(target=child, args=(mine,)) for _, mine in pipes]
    for worker in workers:
        worker.start()
    mine = [[reader.read(place) for place in places] for _ in range(20)]
    assert mine == [expected] * 20
    for (other, _), worker in zip(pipes, workers, strict=True):
        assert other.poll(30)
        assert other.recv() == [expected] * 20
        worker.join(30)


def test_a_size_beyond_the_file_takes_no_memory(tar: Path) -> None:
    (first, *_) = tar_members(tar)
    rest = tar.stat().st_size - first.offset
    found = Reader(tar.parent).read(Place("x.tar", offset=first.offset, size=1 << 60))
    assert len(found) == rest
    assert Reader(tar.parent).read(Place("x.tar", offset=1 << 60, size=1 << 60)) == b""


def test_a_header_that_no_file_could_have_is_damage(tar: Path) -> None:
    broken = bytearray(tar.read_bytes())
    broken[124:136] = b"\x80" + b"\xff" * 11  # the first member's size
    broken[148:156] = b" " * 8
    broken[148:156] = f"{sum(broken[:512]):06o}\0 ".encode()
    tar.write_bytes(broken)
    with pytest.raises(FatError, match="damaged after"):
        read_tar(tar)
