"""Block-wise reconstruction: the error of every block falls, or the block is unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, ReconstructSpec, Student, TrainSpec
from fat.graph.partition import block_outputs, counterpart, segment
from fat.training.block_reconstruction import reconstruct
from tests.conftest import TinyNet
from tests.gpu.pretended import PretendedGpu


def student_of(network: nn.Module, images: Tensor, **options: Any) -> Student:
    student = fat.prepare(
        network, images, QuantSpec(**{"bits": 3, "weights": "adaround", **options})
    )
    fat.calibrate(student, images)
    return student


def recipe(**options: Any) -> TrainSpec:
    return TrainSpec(epochs=0, bias_lr=1e-3, reconstruction=ReconstructSpec(**options))


def test_the_error_of_every_block_falls_or_it_is_unchanged(
    tiny: TinyNet, batches: list[Tensor]
) -> None:
    student = student_of(tiny, torch.cat(batches))
    results = reconstruct(
        student, batches[:-1], batches[-1:], recipe(steps=40, batch_size=4), progress=False
    )
    assert len(results) == len(block_outputs(student.teacher)) + 1
    assert all(result.kept == (result.after < result.before) for result in results)
    assert sum(result.kept for result in results) >= 2
    assert results[0].after < 0.9 * results[0].before


def test_a_block_that_got_worse_is_put_back(tiny: TinyNet, batches: list[Tensor]) -> None:
    student = student_of(tiny, torch.cat(batches))
    before = student.trained_state()
    results = reconstruct(
        student, batches[:-1], batches[-1:], recipe(steps=3, rate=1e4), progress=False
    )
    undone = [result for result in results if not result.kept]
    assert undone
    after = student.trained_state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if len(undone) == len(results):
        assert not changed
    assert not any(result.block in name for result in undone for name in changed)


def test_the_same_seed_gives_the_same_student(tiny: TinyNet, batches: list[Tensor]) -> None:
    states = []
    for seed in (0, 0, 1):
        student = student_of(tiny, torch.cat(batches))
        torch.rand(7)  # the global random state is of no importance
        reconstruct(student, batches, batches, recipe(steps=5), seed=seed, progress=False)
        states.append(student.trained_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_segments_in_a_row_are_the_network(tiny: TinyNet, batches: list[Tensor]) -> None:
    student = student_of(tiny, torch.cat(batches))
    ends = [counterpart(student.network, node) for node in block_outputs(student.teacher)]
    x, start = batches[0], None
    with torch.no_grad():
        for end in (*ends, None):
            x, start = segment(student.network, start, end)(x), end
        assert torch.equal(x, student(batches[0]))


def test_a_segment_from_inside_a_block_is_rejected(tiny: TinyNet, batches: list[Tensor]) -> None:
    student = student_of(tiny, torch.cat(batches))
    inside = next(node for node in student.network.graph.nodes if node.target == "blocks.1.conv_dw")
    with pytest.raises(FatError, match="is not a cut point"):
        segment(student.network, inside, None)


def test_nothing_to_train_changes_nothing(tiny: TinyNet, batches: list[Tensor]) -> None:
    student = student_of(
        tiny, torch.cat(batches), weights="frozen", bias="frozen", thresholds="frozen"
    )
    results = reconstruct(student, batches, batches, recipe(steps=5), progress=False)
    assert not any(result.kept for result in results)


def test_training_says_what_became_of_it(tiny: TinyNet, batches: list[Tensor]) -> None:
    student = student_of(tiny, torch.cat(batches))
    result = fat.fit(student, batches, validation=batches, spec=recipe(steps=30), progress=False)
    assert result.reconstruction == "kept"
    assert result.best_loss < result.calibrated_loss

    student = student_of(
        tiny, torch.cat(batches), weights="frozen", bias="frozen", thresholds="frozen"
    )
    result = fat.fit(student, batches, validation=batches, spec=recipe(steps=1), progress=False)
    assert result.reconstruction == "undone"
    assert fat.fit(student, batches, epochs=0, progress=False).reconstruction == "off"


def test_an_uncalibrated_student_and_no_images_are_refused(
    tiny: TinyNet, batches: list[Tensor]
) -> None:
    student = fat.prepare(tiny, batches[0])
    with pytest.raises(FatError, match="not calibrated"):
        reconstruct(student, batches, batches, recipe(steps=1), progress=False)
    with pytest.raises(FatError, match="There are no images"):
        reconstruct(student_of(tiny, batches[0]), [], batches, recipe(steps=1), progress=False)


@pytest.mark.parametrize(
    "options",
    [{"steps": -1}, {"images": 0}, {"batch_size": 0}, {"rate": 0.0}, {"float_fraction": 1.5}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(FatError, match=f"optim.reconstruction.{next(iter(options))} is"):
        ReconstructSpec(**options)


# --- on a device --------------------------------------------------------------


def on_device(student: Student, batches: list[Tensor], device: str, **options: Any) -> Any:
    """Reconstruct on a device; return results, trained state on the CPU, and saved states."""
    saved: list[dict[str, Any]] = []
    done = options.pop("done", None)
    student.to(device)
    spec = recipe(**{"steps": 4, "batch_size": 4, "images": 9, **options})

    def keep(content: dict[str, Any]) -> None:  # as in a file
        there = {name: value.cpu() for name, value in content["student"].items()}
        saved.append({**content, "student": there})

    results = reconstruct(student, batches, batches, spec, progress=False, done=done, keep=keep)
    assert student.device.type == device
    state = {name: value.cpu() for name, value in student.trained_state().items()}
    return results, state, saved


def test_a_device_draws_the_images_of_the_cpu(tiny: TinyNet, batches: list[Tensor]) -> None:
    wanted = on_device(student_of(tiny, batches[0]), batches, "cpu", float_fraction=0.0)
    student = student_of(tiny, batches[0])
    with PretendedGpu():
        results, state, _ = on_device(student, batches, "cuda", float_fraction=0.0)
    assert results == wanted[0]
    assert all(torch.equal(state[name], value) for name, value in wanted[1].items())


def test_steps_on_a_device_do_not_wait_for_it(tiny: TinyNet, batches: list[Tensor]) -> None:
    counts = []
    with PretendedGpu() as gpu:
        for steps in (2, 6):
            student = student_of(tiny, batches[0]).to("cuda")
            on_the_device = [batch.to("cuda") for batch in batches]
            with gpu.counting() as counted:
                on_device(student, on_the_device, "cuda", steps=steps)
            counts.append((counted.reads, counted.waiting_copies))
    assert counts[0] == counts[1]


def test_a_reconstruction_resumes_on_another_device(tiny: TinyNet, batches: list[Tensor]) -> None:
    cpu = on_device(student_of(tiny, batches[0]), batches, "cpu")
    with PretendedGpu():
        gpu = on_device(student_of(tiny, batches[0]), batches, "cuda")
        again = on_device(student_of(tiny, batches[0]), batches, "cuda", done=gpu[2][0])
        moved = on_device(student_of(tiny, batches[0]), batches, "cuda", done=cpu[2][0])
    assert again[0] == gpu[0]
    assert all(torch.equal(again[1][name], value) for name, value in gpu[1].items())
    assert moved[0][0] == cpu[0][0]
    back = on_device(student_of(tiny, batches[0]), batches, "cpu", done=gpu[2][0])
    assert back[0][0] == gpu[0][0]
