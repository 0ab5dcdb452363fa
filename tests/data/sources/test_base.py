from __future__ import annotations

import pickle

import pytest

from fat.data.sources import base as sources
from fat.data.sources.base import PhotoSource
from fat.utils.errors import FatError


def test_photographs_repeat_in_turn() -> None:
    pytest.importorskip("skimage")
    source = PhotoSource(["chelsea.png", "coffee.png"], 5)
    assert [source.name(i) for i in range(5)] == [
        "chelsea.png#0",
        "coffee.png#0",
        "chelsea.png#1",
        "coffee.png#1",
        "chelsea.png#2",
    ]
    assert source.load(0).size == source.load(4).size == (451, 300)
    assert source.load(1).size == (600, 400)
    assert not source.labelled
    assert source.label(3) == -1
    assert len(pickle.dumps(source)) < 2000  # without the decoded pixels


def test_photograph_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FatError, match=r"no photograph nope.png. It has: .*chelsea.png"):
        PhotoSource(["chelsea.png", "nope.png"], 5)
    with pytest.raises(FatError, match="at least one"):
        PhotoSource(["chelsea.png"], 0)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FatError, match=r"needs scikit-image.*pip install scikit-image"):
        PhotoSource(["chelsea.png"], 5)
