"""Names of classes."""

from __future__ import annotations

import re

from fat.models.labels import class_names, readable_classes


def test_class_names() -> None:
    names = class_names(1000)
    assert names is not None
    assert len(set(names)) == 1000
    assert names == sorted(names)  # ImageNet's classes are in the order of their WordNet ids
    assert class_names(10) is None


def test_readable_classes() -> None:
    names = readable_classes(1000)
    assert len(names) == 1000
    assert names[281] == "tabby"
    assert {name for name in names if names.count(name) > 1} == {"crane"}  # a bird and a machine
    assert names[638:640] == ["maillot", "maillot, tank suit"]
    assert not any(re.fullmatch(r"n\d{8}", name) for name in names)
    assert len(readable_classes(21841)) == 21841
    assert readable_classes(3) == ["0", "1", "2"]
    assert readable_classes(3, ["n02123045", "n99999999", "a, b"]) == ["tabby", "n99999999", "a"]
