"""Several real processes give what one gives, and none is left when one of them fails."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec
from fat.evaluation.evaluator import Disagreements, evaluate
from fat.evaluation.metrics import Comparison
from fat.utils import distributed
from tests.conftest import TinyNet, realistic
from tests.integration.processes import (
    INITS,
    everything,
    logits,
    mixed,
    one_of_them,
    rmse_gradient,
    thresholds,
)

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def data() -> tuple[nn.Module, list[Tensor]]:
    """A network, and eleven images in batches of four, four and three."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(11, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(coarse, size=16, mode="bilinear")
    torch.manual_seed(0)
    return realistic(TinyNet(), images), list(images.split(4))


@pytest.fixture(scope="module")
def both(data: tuple[nn.Module, list[Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The findings of each of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    answer = distributed.launch(everything, (folder, *data), 2, "cpu")
    assert answer == "result of 0"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_processes_know_who_they_are(both: Found) -> None:
    assert [(found["rank"], found["size"]) for found in both] == [(0, 2), (1, 2)]
    assert (distributed.rank(), distributed.size()) == (0, 1)  # this one started them


def test_sums_and_maxima_are_over_all(both: Found) -> None:
    parts = [torch.tensor([[1.0, -5.0], [3.0, 0.0]]), torch.tensor([[1.0, -5.0], [3.0, 10.0]])]
    for rank, found in enumerate(both):
        assert torch.equal(found["sum"], parts[0] + parts[1])
        assert torch.equal(found["max"], torch.maximum(*parts))
        assert torch.equal(found["rows"], torch.stack(parts))
        assert torch.equal(found["kept"], parts[rank])  # the argument stays as it is


def test_objects_and_states_travel(both: Found) -> None:
    for found in both:
        assert found["told"] == {"from": 0}
        assert found["all"] == [{"from": 0}, {"from": 1}]
        assert float(found["state"]["a"]) == 0.0


def test_rows_of_unequal_numbers_become_one_batch(both: Found) -> None:
    for found in both:
        assert [part[:, 0].tolist() for part in found["batches"]] == [[0, 0, 0, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("name", "counts"),
    [("several", (3, 1)), ("several, one without", (0, 2)), ("several, one row", (1, 0))],
)
def test_tensors_of_several_dtypes_travel_together(
    both: Found, name: str, counts: tuple[int, int]
) -> None:
    parts = [mixed(rank, count) for rank, count in enumerate(counts)]
    wanted = [torch.cat(column) for column in zip(*parts, strict=True)]
    for found in both:
        for got, expected in zip(found[name], wanted, strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)
    alone = mixed(0, 3)
    assert distributed.gather_batches(*alone) == alone


def test_only_the_number_of_rows_is_exchanged_besides_all_tensors_together(both: Found) -> None:
    assert [found["collectives"] for found in both] == [[torch.int64, torch.uint8]] * 2


def test_a_sum_in_place(both: Found) -> None:
    assert [found["in place"].tolist() for found in both] == [[3.0] * 3] * 2


@pytest.mark.parametrize(
    ("accelerator", "backend", "options"),
    [("cpu", "gloo", {}), ("gpu", "cpu:gloo,cuda:nccl", {"device_id": torch.device("cuda", 1)})],
)
def test_a_group_of_gpus_sends_cpu_tensors_by_gloo(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, backend: str, options: dict[str, Any]
) -> None:
    joined: list[Any] = []
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda name, **given: joined.append((name, given))
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    distributed.join(accelerator)
    assert joined == [(backend, {"timeout": distributed.TIMEOUT, **options})]
    assert chosen == ([1] if accelerator == "gpu" else [])


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(FatError, match=r"Process 2 .* torch finds 2. Type trainer.devices=2"):
        distributed.join("gpu")


@pytest.mark.parametrize(
    ("config", "device", "wanted"),
    [
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "meta", "cpu"),
        ("cuda:nccl", "cpu", "cuda"),
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
    ],
)
def test_tensors_travel_from_a_device_that_the_group_supports(
    monkeypatch: pytest.MonkeyPatch, config: str, device: str, wanted: str
) -> None:
    moved: list[torch.device] = []

    def to(x: Tensor, device: torch.device, copy: bool) -> Tensor:
        moved.append(device)
        return x

    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: config)
    monkeypatch.setattr(Tensor, "to", to)
    distributed._movable(torch.zeros(2, device=device))
    assert [x.type for x in moved] == [wanted]


def test_the_gradient_of_a_loss_that_is_no_mean_is_that_of_one_process(both: Found) -> None:
    rows = torch.cat([torch.arange(6.0).view(3, 2) + 1, torch.tensor([[-2.0, 7.0]])]).double()
    weight = torch.tensor([[0.5], [-1.5]]).double()
    out = rows @ weight
    wanted = rows.T @ out / (len(rows) * out.square().mean().sqrt())  # ∂√mean(y²)/∂w by hand
    for found in both:
        torch.testing.assert_close(found["gradient"].double(), wanted, rtol=1e-6, atol=1e-6)
    alone = rmse_gradient([rows.float()], weight.float())
    torch.testing.assert_close(alone.double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_first_goes_first_and_each_works_alone(both: Found) -> None:
    assert [found["was there"] for found in both] == [False, True]
    assert both[0]["inside"] == (0, 1, 0.0)
    assert both[1]["inside"] == (0, 1, 10.0)  # its own value, not a sum
    assert [found["alone"] for found in both] == [(0, 1), (0, 1)]
    assert [found["after"] for found in both] == [(0, 2), (1, 2)]


@pytest.mark.parametrize(("name", "parts"), [("uneven", [(5, 0), (2, 1)]), ("none", [(7, 0)])])
def test_figures_are_those_of_all_images(
    both: Found, name: str, parts: list[tuple[int, int]]
) -> None:
    one = Comparison()
    one.update(*(torch.cat(x) for x in zip(*(logits(*part) for part in parts), strict=True)))
    wanted = one.compute()
    assert None not in wanted.values()
    for found in both:
        assert found[name] == pytest.approx(wanted, rel=1e-12)


def test_evaluating_a_set_that_cannot_be_shared_evenly(
    both: Found, data: tuple[nn.Module, list[Tensor]]
) -> None:
    network, batches = data
    student = fat.prepare(network, batches[0], QuantSpec(bits=4))
    fat.calibrate(student, batches)
    differing = Disagreements()
    wanted = evaluate(student, batches, differing=differing)
    assert wanted["images"] == 11
    assert differing.differing > 0
    for found in both:
        got = found["evaluate"]
        assert got["images"] == 11
        for name in ("agreement", "sqnr_db", "rmse"):
            assert got["quantized"][name] == pytest.approx(wanted["quantized"][name], rel=1e-9)
        assert got["float"] == wanted["float"] == {"top1": None, "top5": None}
        images, count, confidences = found["differing"]
        assert (images, count) == (11, differing.differing)
        assert confidences == pytest.approx([entry.confidence for entry in differing.kept])


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shares", ["", ", one without"])
def test_calibration_sets_the_thresholds_of_one_process(
    both: Found, data: tuple[nn.Module, list[Tensor]], init: str, shares: str
) -> None:
    wanted = thresholds(*data, init)
    assert any("activation" in name for name in wanted)
    for found in both:
        got = found[f"thresholds {init}{shares}"]
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(got[name], value), name


def test_no_process_has_an_image(both: Found) -> None:
    for found in both:
        assert "There are no calibration images" in found["no images"]


# --- failures -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "count", "error", "words"),
    [
        ("told", 2, FatError, "^Type something else.$"),
        ("broken", 2, FatError, "(?s)Process 1 of 2 failed.*ValueError: a mistake of the program"),
        ("killed", 2, FatError, "fat-1 of 2 ended with status 9 and no message.*devices"),
        ("Ctrl-C", 1, KeyboardInterrupt, ""),
    ],
)
def test_when_one_fails_the_caller_is_told_and_no_process_stays(
    tmp_path: Path, how: str, count: int, error: type[BaseException], words: str
) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=words):
        distributed.launch(one_of_them, (tmp_path, how), count, "cpu")
    assert time.monotonic() - started < 60  # not the hours for which they would wait
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(pids) == count
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
