from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fat.data.sources import listing
from fat.data.sources.decoding import IMAGE_SUFFIXES
from fat.data.sources.folder import FolderSource
from fat.utils.errors import FatError

WNIDS = ["n01440764", "n01443537", "n01484850"]


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            # Images are identified by their width.
            Image.new("RGB", (len(name), 1)).save(path, "PNG")
        else:
            path.write_text("x")
    return root


def names(source: FolderSource) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_recursive_sorted_any_case(tmp_path: Path) -> None:
    put(tmp_path, "z.JPG", "a.png", "b/c/d.Jpeg", "b/10.webp", "b/9.webp", "notes.txt", "ü/ß.png")
    source = FolderSource(tmp_path)
    assert names(source) == ["a.png", "z.JPG", "b/10.webp", "b/9.webp", "b/c/d.Jpeg", "ü/ß.png"]
    assert [source.load(i).width for i in range(6)] == [len(name) for name in names(source)]
    assert not source.labelled
    assert source.label(0) == -1
    with pytest.raises(IndexError):
        source.name(6)


def test_survives_pickling(tmp_path: Path) -> None:
    source = FolderSource(put(tmp_path, "0/a.png", "1/b.png"))
    copy = pickle.loads(pickle.dumps(source))
    assert names(copy) == names(source)
    assert [copy.label(i) for i in range(2)] == [0, 1]


def test_hidden_and_loops_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path, "b/a.png", ".hidden/x.png", "b/.thumb.png", "b/._a.png")
    (tmp_path / "b/loop").symlink_to(tmp_path)
    (tmp_path / "a_link").symlink_to(tmp_path / "b")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert names(FolderSource(tmp_path)) == ["b/a.png"]


def test_links_to_other_places_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "far", "x.png")
    root = put(tmp_path / "near", "a.png")
    (root / "link").symlink_to(tmp_path / "far")
    assert names(FolderSource(root)) == ["a.png", "link/x.png"]


def test_wnids_become_class_indices(tmp_path: Path) -> None:
    put(tmp_path, f"{WNIDS[2]}/a.png", f"{WNIDS[0]}/sub/b.png", f"{WNIDS[0]}/c.png")
    source = FolderSource(tmp_path, WNIDS)
    assert source.labelled
    found = {source.name(i): source.label(i) for i in range(3)}
    assert found == {f"{WNIDS[0]}/c.png": 0, f"{WNIDS[0]}/sub/b.png": 0, f"{WNIDS[2]}/a.png": 2}
    mapped = FolderSource(tmp_path, {WNIDS[0]: 7, WNIDS[2]: 9})
    assert sorted({mapped.label(i) for i in range(3)}) == [7, 9]


def test_class_indices(tmp_path: Path) -> None:
    put(tmp_path, "0/a.png", "002/b.png", "10/c.png")
    source = FolderSource(tmp_path, num_classes=11)
    assert [source.label(i) for i in range(3)] == [0, 2, 10]
    assert not FolderSource(tmp_path, num_classes=10).labelled  # 10 is not one of ten classes


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([f"{WNIDS[0]}/a.png", f"{WNIDS[1]}/b.png", "other/c.png"], id="other folder"),
        pytest.param([f"{WNIDS[0]}/a.png", "c.png"], id="file at the top"),
        pytest.param(["cat/a.png", "dog/b.png"], id="own names"),
    ],
)
def test_unlabelled_unless_all_are_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: list[str]
) -> None:
    source = FolderSource(put(tmp_path, *files), WNIDS)
    assert not source.labelled
    assert {source.label(i) for i in range(len(source))} == {-1}
    warned = "Ignoring the labels" in caplog.text
    assert warned == (WNIDS[0] in files[0])  # only if it is probably a mistake


def test_missing_folder_names_its_siblings(tmp_path: Path) -> None:
    put(tmp_path, "pictures/a.png", "music/b.txt")
    with pytest.raises(FatError, match=r"picures does not exist. Did you mean .*pictures\?"):
        FolderSource(tmp_path / "picures")
    with pytest.raises(FatError, match=r"has the folders: music, pictures. Type data.root=DIR"):
        FolderSource(tmp_path / "qqqq" / "deep" / "er")
    with pytest.raises(FatError, match="is a file, not a folder"):
        FolderSource(tmp_path / "music/b.txt")


def test_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"holds no images; found: nothing.*\.jpeg.*data.root=DIR"):
        FolderSource(tmp_path)
    put(tmp_path, "a.txt", "b/c.txt", "b/d.tar", "README")
    with pytest.raises(FatError, match=r"found: 2 \.txt, 1 (\.tar|\(none\))"):
        FolderSource(tmp_path)


def test_folder_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:  # chmod has no effect for root
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", refuse)
    assert names(FolderSource(tmp_path)) == ["a.png"]
    assert "locked, which cannot be listed" in caplog.text
