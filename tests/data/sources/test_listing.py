from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import sqlite3
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fat.data.sources import listing
from fat.data.sources.archives import Place
from fat.data.sources.folder import FolderSource
from fat.data.sources.listing import Builder, Entry, Hashes, Listing, list_folder
from fat.utils.errors import FatError

LONG_AGO = 1_600_000_000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(listing, "cache_folder", (tmp_path / "cache").joinpath)
    return tmp_path / "cache" / "listings"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/1.jpg", "a/2.jpg", "b/3.png", "b/notes.txt"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    age(tmp_path / "root")
    return tmp_path / "root"


def age(root: Path, when: float = LONG_AGO) -> None:
    """Set back the times of all folders, because recent changes invalidate a listing."""
    for path in (root, *root.rglob("*")):
        os.utime(path, (when, when))


def names(listed: Listing) -> list[str]:
    return [entry.place.path for entry in listed.entries()]


def files(cache: Path) -> list[str]:
    return sorted(os.listdir(cache))


def test_what_a_listing_holds(cache: Path, root: Path) -> None:
    listed = list_folder(root)
    assert names(listed) == ["a/1.jpg", "a/2.jpg", "b/3.png"]
    assert [listed.entry(i) for i in range(3)] == list(listed.entries())
    assert list(listed.folders()) == ["a", "b"]
    assert listed.others == {".txt": 1}
    for index in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            listed.entry(index)


def test_order_is_that_of_folder_file_and_place(cache: Path, tmp_path: Path) -> None:
    entries = [
        Entry("b", "x.tar", "late", 512, 3),
        Entry("b", "x.tar", "early", 0, 3),
        Entry("", "z"),
        Entry("a/b", "x"),
        Entry("a", "y"),
        Entry("a", "p.parquet", row=10, label=3),
        Entry("a", "p.parquet", row=9),
        Entry("a", "\udcff\u20ac.jpg"),
        Entry("a-b", "\U0001f600"),
    ]

    def fill(builder: Builder) -> None:
        for entry in entries:
            builder.add(entry)

    listed = Listing.of(tmp_path, "test", fill, progress=False)
    key = lambda e: (e.folder, e.file, e.offset, e.row)  # noqa: E731
    assert list(listed.entries()) == sorted(entries, key=key)


def test_reused_until_something_changes(
    cache: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = list_folder(root)
    assert list_folder(root).path == first.path
    assert "again" not in caplog.text
    (root / "b/4.jpg").touch()
    second = list_folder(root)
    assert f"Listing {root} again: {root}/b has changed" in caplog.text
    assert names(second) == ["a/1.jpg", "a/2.jpg", "b/3.png", "b/4.jpg"]
    assert names(first) == ["a/1.jpg", "a/2.jpg", "b/3.png"]  # listings in use are not disturbed
    (root / "a/1.jpg").unlink()
    (root / "a/2.jpg").unlink()
    (root / "a").rmdir()
    assert names(list_folder(root)) == ["b/3.png", "b/4.jpg"]


def test_a_folder_that_was_just_changed_is_listed_again(
    cache: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    age(root, time.time() - 0.5)
    first = list_folder(root)
    assert list_folder(root).path != first.path
    assert "was still changing last time" in caplog.text


def test_archives_are_watched(cache: Path, root: Path) -> None:
    calls = []

    def fill(builder: Builder) -> None:
        builder.watch("a/1.jpg")
        calls.append(1)

    for _ in range(2):
        Listing.of(root, "test", fill, progress=False)
    assert len(calls) == 1
    (root / "a/1.jpg").write_text("longer")
    os.utime(root / "a/1.jpg", (LONG_AGO, LONG_AGO))
    Listing.of(root, "test", fill, progress=False)
    assert len(calls) == 2
    Listing.of(root, "other kind", fill, progress=False)
    assert len(calls) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, FatError, OSError])
def test_a_build_that_stops_leaves_nothing(
    cache: Path, root: Path, error: type[BaseException]
) -> None:
    def fill(builder: Builder) -> None:
        for i in range(5000):
            builder.add(Entry("a", f"{i}.jpg"))
        raise error

    with pytest.raises((error, FatError)):
        Listing.of(root, "test", fill, progress=False)
    assert files(cache) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_build_leaves_nothing_that_looks_whole(cache: Path, root: Path) -> None:
    def fill(builder: Builder) -> None:
        for i in range(5000):
            builder.add(Entry("a", f"{i}.jpg"))
        os._exit(9)

    context = multiprocessing.get_context("fork")
    child = context.Process(
        target=Listing.of, args=(root, "folder", fill), kwargs={"progress": False}
    )
    child.start()
    child.join(30)
    assert child.exitcode == 9
    (rest,) = files(cache)
    assert rest.startswith(".")
    assert names(list_folder(root)) == ["a/1.jpg", "a/2.jpg", "b/3.png"]
    # After a month it is deleted, as are unused listings.
    age(cache)
    Listing.of(root, "other", lambda builder: None, progress=False)
    assert len(files(cache)) == 1


def test_a_damaged_listing_is_made_anew(cache: Path, root: Path) -> None:
    path = list_folder(root).path
    for content in (b"", b"no database", path.read_bytes()[:3000]):
        path.write_bytes(content)
        assert len(names(list_folder(root))) == 3


def test_an_unreadable_folder_is_tried_again(
    cache: Path, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scandir = os.scandir

    class Failing:
        """Fails after the first entry."""

        def __init__(self, path: str) -> None:
            self.scan = scandir(path)

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            yield next(self.scan)
            raise OSError(5, "Input/output error")

        def __exit__(self, *_: object) -> None:
            self.scan.close()

    with monkeypatch.context() as patch:
        fail = lambda path: Failing(path) if str(path).endswith("/a") else scandir(path)  # noqa: E731
        patch.setattr(listing.os, "scandir", fail)
        assert names(list_folder(root)) == ["b/3.png"]
        assert "Skipping the folder" in caplog.text
        assert "a, which cannot be listed" in caplog.text
    assert len(names(list_folder(root))) == 3


def test_a_link_to_itself(cache: Path, root: Path) -> None:
    (root / "a/loop.jpg").symlink_to("loop.jpg")
    assert len(names(list_folder(root))) == 3


def test_processes_at_once(cache: Path, root: Path) -> None:
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    children = [context.Process(target=list_folder, args=(root,)) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 6
    assert all(name.endswith(".sqlite") and name[0] != "." for name in files(cache))
    assert len(names(list_folder(root))) == 3


def test_a_listing_survives_pickling_forks_and_threads(cache: Path, root: Path) -> None:
    listed = list_folder(root)
    expected = names(listed)
    copy = pickle.loads(pickle.dumps(listed))
    assert names(copy) == expected
    with ThreadPoolExecutor(4) as pool:
        assert [e.place.path for e in pool.map(listed.entry, [0, 1, 2] * 50)] == expected * 50
    if hasattr(os, "fork"):
        with multiprocessing.get_context("fork").Pool(2) as pool_of_processes:
            found = pool_of_processes.map(listed.entry, [0, 1, 2] * 50)
        assert [entry.place.path for entry in found] == expected * 50


def test_a_listing_that_is_gone(cache: Path, root: Path) -> None:
    copy = pickle.dumps(list_folder(root))
    for name in files(cache):
        (cache / name).unlink()
    with pytest.raises(FatError, match=r"is gone.*Start again"):
        pickle.loads(copy).entry(0)


def test_a_cache_that_cannot_be_written(
    cache: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file where the folder should be")
    listing._private_folder.cache_clear()
    listed = list_folder(root)
    assert len(names(pickle.loads(pickle.dumps(listed)))) == 3
    assert "Set XDG_CACHE_HOME=DIR" in caplog.text
    assert cache.parent not in listed.path.parents
    listing._private_folder.cache_clear()


def test_a_full_disk(cache: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(builder: Builder) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(FatError, match=r"disk is full. Free disk space there, or set XDG_CACHE"):
        Listing.of(root, "test", full, progress=False)


def test_memory_does_not_grow_with_the_images(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def crowd(path: Any) -> Any:
        if Path(path).name != "crowd":
            return scandir(path)

        class Scan:
            def __enter__(self) -> Iterator[Any]:
                for i in range(count):
                    yield SimpleNamespace(
                        name=f"{i * 7919 % count:07d}.jpg",
                        is_dir=lambda: False,
                        is_file=lambda: True,
                        is_symlink=lambda: False,
                    )

            def __exit__(self, *_: object) -> None:
                pass

        return Scan()

    monkeypatch.setattr(listing.os, "scandir", crowd)
    (tmp_path / "crowd").mkdir()

    def peak() -> int:
        os.utime(tmp_path / "crowd")
        tracemalloc.start()
        source = FolderSource(tmp_path / "crowd")
        assert len(source) == count
        assert source.name(count - 1) == f"{count - 1:07d}.jpg"
        assert len(pickle.dumps(source)) < 1000
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    count = 2_000
    peak()  # loads lazy imports
    small = peak()
    count = 20_000
    assert peak() < small + 100_000


def test_hashes_hold_as_long_as_the_file(cache: Path, root: Path) -> None:
    place = Place("a/1.jpg")
    for _ in range(2):
        hashes = Hashes()
        hashes.keep(root, place, "abc")
        assert hashes.find(root, place) == "abc"
        hashes.close()
    again = Hashes()
    assert again.find(root, place) == "abc"
    assert again.find(root, Place("a/1.jpg", offset=3)) is None
    (root / "a/1.jpg").write_text("other")
    assert again.find(root, place) is None
    again.keep(root, place, "def")  # it may change again within the resolution of file times
    assert again.find(root, place) is None
    with pytest.raises(FileNotFoundError):
        again.find(root, Place("a/9.jpg"))
    again.close()


def test_hashes_without_a_cache(cache: Path, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cache.mkdir(parents=True)
    (cache / "hashes.sqlite").write_text("no database" * 100)
    hashes = Hashes()
    hashes.keep(root, Place("a/1.jpg"), "abc")
    assert hashes.find(root, Place("a/1.jpg")) is None
    hashes.close()
    assert "Not caching the hashes of images" in caplog.text
