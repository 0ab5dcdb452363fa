from __future__ import annotations

import pytest

from fat.utils.errors import FatError, missing_extra, nearest, unknown_name


def test_nearest_puts_the_most_similar_first() -> None:
    names = ["mobilenetv3_large_100", "mobilenetv2_100", "mobilenetv2_110d", "resnet18"]
    assert nearest("mobilnetv2_100", names)[0] == "mobilenetv2_100"
    assert "resnet18" not in nearest("mobilnetv2_100", names)
    assert len(nearest("mobilnetv2_100", names, count=1)) == 1
    assert nearest("zzz", names) == []


def test_nearest_takes_any_iterable_once() -> None:
    assert nearest("minmix", (name for name in ("minmax", "percentile"))) == ["minmax"]


def test_unknown_name_says_what_came_what_is_near_what_is_allowed_and_what_to_type() -> None:
    error = unknown_name("loss", "rsme", iter(["rmse", "authors_code"]), "Type optim.loss=rmse.")
    assert isinstance(error, FatError)
    assert str(error) == (
        "Unknown loss 'rsme'. Did you mean 'rmse'? Allowed: rmse, authors_code. "
        "Type optim.loss=rmse."
    )


def test_unknown_name_without_a_near_one_only_lists() -> None:
    assert str(unknown_name("scheme", "zzz", ["symmetric"])) == (
        "Unknown scheme 'zzz'. Allowed: symmetric."
    )


@pytest.mark.parametrize("given", [None, 8, 1.5, ["rmse"]])
def test_unknown_name_of_any_type(given: object) -> None:
    assert str(unknown_name("loss", given, ["rmse"])).startswith(f"Unknown loss {given!r}.")


@pytest.mark.parametrize(("count", "listed"), [(30, True), (31, False)])
def test_long_lists_are_left_out_but_still_searched(count: int, listed: bool) -> None:
    names = [f"network_{i}" for i in range(count)]
    text = str(unknown_name("network", "netwrk_7", names))
    assert "'network_7'" in text
    assert ("Allowed: " in text) is listed


def test_a_missing_extra_is_named_with_the_command_that_installs_it() -> None:
    assert str(missing_extra("openvino", "OpenVINO", "or export=onnx")) == (
        "OpenVINO is not installed: type pip install -e '.[openvino]', or export=onnx."
    )
