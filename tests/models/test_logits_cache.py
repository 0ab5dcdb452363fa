"""Cached logits equal computed ones, and depend on the batch and the network."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import QuantSpec, Student
from fat.evaluation.evaluator import evaluate
from fat.models.logits_cache import TeacherLogitsCache


@pytest.fixture
def student(tiny: nn.Module, images: Tensor) -> Student:
    student = fat.prepare(tiny, images, QuantSpec())
    fat.calibrate(student, images)
    return student


@pytest.fixture(params=["memory", "file"])
def cached(request: pytest.FixtureRequest, student: Student, tmp_path: Path) -> TeacherLogitsCache:
    file = tmp_path / "shared" / "logits.sqlite" if request.param == "file" else None
    return TeacherLogitsCache(student.teacher, file)


@torch.no_grad()
def ask(cached: TeacherLogitsCache, network: nn.Module, images: Tensor) -> Tensor:
    return cached(images, lambda x: network(x.contiguous(memory_format=torch.channels_last)))


def counts(cached: TeacherLogitsCache) -> tuple[int, int]:
    return cached.misses, cached.hits


def never(images: Tensor) -> Tensor:
    raise AssertionError("the network was asked")


def test_what_comes_again_is_found_bit_for_bit(
    cached: TeacherLogitsCache, student: Student, batches: list[Tensor]
) -> None:
    first = [ask(cached, student.teacher, batch) for batch in batches]
    assert counts(cached) == (16, 0)
    again = [cached(batch.clone(), never) for batch in batches]
    assert counts(cached) == (16, 16)
    for one, other, batch in zip(first, again, batches, strict=True):
        assert torch.equal(one, other)
        with torch.no_grad():
            truth = student.teacher(batch.contiguous(memory_format=torch.channels_last))
        assert torch.equal(one, truth)


def test_changing_what_was_given_does_not_change_what_is_known(
    cached: TeacherLogitsCache, student: Student, images: Tensor
) -> None:
    first = ask(cached, student.teacher, images)
    wanted = first.clone()
    first.zero_()
    assert torch.equal(cached(images, never), wanted)


def test_the_order_in_memory_is_no_difference(
    cached: TeacherLogitsCache, student: Student, images: Tensor
) -> None:
    first = ask(cached, student.teacher, images)
    assert torch.equal(cached(images.contiguous(memory_format=torch.channels_last), never), first)
    assert torch.equal(cached(images.transpose(2, 3).contiguous().transpose(2, 3), never), first)


def test_other_pixels_another_order_and_another_number_are_not_found(
    cached: TeacherLogitsCache, student: Student, images: Tensor
) -> None:
    ask(cached, student.teacher, images)
    one_bit = images.clone()
    one_bit[7, 1, 3, 5] = torch.nextafter(one_bit[7, 1, 3, 5], torch.tensor(9.0))
    others = [one_bit, images.flip(0), images[:8], images.transpose(2, 3), images.flip(1)]
    for other in others:
        ask(cached, student.teacher, other)
    assert counts(cached) == (16 * 5 + 8, 0)


def changed_weight(network: nn.Module) -> None:
    buffer = next(b for name, b in network.named_buffers() if name.endswith("weight"))
    buffer[0, 0, 0, 1] += 1e-3


def changed_stride(network: nn.Module) -> None:
    network.get_submodule("stem").stride = (1, 1)  # type: ignore[assignment]


@pytest.mark.parametrize("change", [changed_weight, changed_stride])
def test_another_network_finds_nothing(
    student: Student, tiny: nn.Module, images: Tensor, tmp_path: Path, change: object
) -> None:
    file = tmp_path / "logits.sqlite"
    ask(TeacherLogitsCache(student.teacher, file), student.teacher, images)
    other = fat.prepare(tiny, images, QuantSpec(bits=4)).teacher
    same = TeacherLogitsCache(other, file)
    ask(same, other, images)
    assert counts(same) == (0, 16)
    change(other)  # type: ignore[operator]
    cached = TeacherLogitsCache(other, file)
    got = ask(cached, other, images)
    assert counts(cached) == (16, 0)
    with torch.no_grad():
        assert not torch.equal(got, student.teacher(images))


def test_the_number_of_threads_is_part_of_the_key(
    student: Student, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "logits.sqlite"
    ask(TeacherLogitsCache(student.teacher, file), student.teacher, images)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    cached = TeacherLogitsCache(student.teacher, file)
    ask(cached, student.teacher, images)
    assert counts(cached) == (16, 0)


def test_threads_share_one_file(student: Student, batches: list[Tensor], tmp_path: Path) -> None:
    caches = [TeacherLogitsCache(student.teacher, tmp_path / "logits.sqlite") for _ in range(4)]
    wrong: list[object] = []
    wanted = [student.float_logits(batch) for batch in batches]

    def work(cached: TeacherLogitsCache) -> None:
        try:
            for _ in range(5):
                for batch, logits in zip(batches, wanted, strict=True):
                    if not torch.equal(ask(cached, student.teacher, batch), logits):
                        wrong.append(batch)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(cached,)) for cached in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(cached.misses + cached.hits == 80 for cached in caches)
    assert sum(cached.misses for cached in caches) <= 4 * 16
    with sqlite3.connect(tmp_path / "logits.sqlite") as database:
        assert database.execute("SELECT count(*), sum(rows) FROM logits").fetchone() == (4, 16)


def test_a_writer_that_takes_its_time_is_waited_for(
    student: Student, images: Tensor, tmp_path: Path
) -> None:
    """Another process locks the file for a second, as with a slow disk."""
    file = tmp_path / "logits.sqlite"
    cached = TeacherLogitsCache(student.teacher, file)
    wanted = ask(cached, student.teacher, images[:4])
    script = (
        "import sqlite3, sys, time\n"
        "database = sqlite3.connect(sys.argv[1])\n"
        "database.execute('BEGIN EXCLUSIVE')\n"
        "print('held', flush=True)\n"
        "time.sleep(1)\n"
        "database.execute('INSERT INTO logits VALUES (x\\'00\\', 0, x\\'\\')')\n"
        "database.commit()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    ask(cached, student.teacher, images[4:8])
    assert holder.wait(20) == 0
    assert torch.equal(cached(images[:4], never), wanted)
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT count(*) FROM logits").fetchone() == (3,)


def test_when_it_is_worth_looking(student: Student, images: Tensor, tmp_path: Path) -> None:
    alone = TeacherLogitsCache(student.teacher)
    shared = TeacherLogitsCache(student.teacher, tmp_path / "logits.sqlite")
    with torch.no_grad():
        assert alone.is_worthwhile(images)
        assert shared.is_worthwhile(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert not alone.is_worthwhile(images)
            assert not shared.is_worthwhile(images)
        assert not shared.is_worthwhile(images.to("meta"))  # stands for a GPU
    with torch.enable_grad():
        assert not alone.is_worthwhile(images)  # one run never repeats its training crops
        assert shared.is_worthwhile(images)


def test_a_training_by_itself_remembers_what_it_judges_by(
    student: Student, batches: list[Tensor]
) -> None:
    student.teacher_cache = TeacherLogitsCache(student.teacher)
    held = [batches[0][:3] * 0.9]
    fat.fit(student, batches, validation=held, epochs=3, progress=False, bias_correction=False)
    # Only the first of four validations computed; training batches were not cached.
    assert counts(student.teacher_cache) == (3, 9)
    evaluate(student, held)
    assert counts(student.teacher_cache) == (3, 12)


def test_a_second_training_with_the_same_file_computes_nothing(
    tiny: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    results, caches = [], []
    for bits in (8, 4, 8):
        student = fat.prepare(tiny, batches, QuantSpec(bits=bits))
        fat.calibrate(student, batches)
        student.teacher_cache = TeacherLogitsCache(student.teacher, tmp_path / "logits.sqlite")
        fat.fit(student, batches, validation=[batches[0] * 0.9], epochs=2, progress=False)
        caches.append(student.teacher_cache)
        results.append(student.state_dict())
    assert caches[0].misses == 16 + 4
    assert [cached.misses for cached in caches[1:]] == [0, 0]
    assert caches[1].hits > 0
    student = fat.prepare(tiny, batches, QuantSpec(bits=8))
    fat.calibrate(student, batches)
    fat.fit(student, batches, validation=[batches[0] * 0.9], epochs=2, progress=False)
    for name, value in student.state_dict().items():  # as without any cached
        assert torch.equal(value, results[0][name])
        assert torch.equal(value, results[2][name])
