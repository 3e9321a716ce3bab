"""Batches are a function of (seed, epoch, step, rank, world) alone; failures of workers are one sentence."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fabric.data import images as image_files
from detr_fabric.data.batch import ImageBatch, Target
from detr_fabric.data.dataset import CocoDetection
from detr_fabric.data.formats.annotations import read_annotations
from detr_fabric.data.loader import TrainLoader
from detr_fabric.data.transforms import EvalTransform, TrainTransform
from detr_fabric.errors import UserError
from tests.batches import assert_same, eval_loader, ids, train_loader
from tests.coco_files import coco, image, thing, write_images, write_json
from tests.patching import Patch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    """22 images of different sizes, every second one with an object, under strong augmentation."""
    folder = tmp_path_factory.mktemp("coco")
    images = [image(n, width=40 + n, height=30 + 2 * n) for n in range(22)]
    content = coco(images, [thing(n, n, category=1 + n % 2) for n in range(0, 22, 2)])
    annotations = read_annotations(write_json(folder / "instances.json", content))
    transform = TrainTransform((20, 24, 28, 32), 64, 0.5, crop=True)
    return CocoDetection(write_images(folder / "images", content), annotations, transform, seed=7)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def worker_pids(loader: TrainLoader) -> list[int]:
    return [worker.pid for worker in loader.workers.loader._iterator._workers]


def test_a_step_is_accumulate_batches_of_uint8_images_and_targets(dataset: CocoDetection) -> None:
    loader = train_loader(dataset, pad_multiple=8)
    steps = list(loader.epoch(0))
    assert len(steps) == loader.steps_per_epoch == 5
    for step in steps:
        assert len(step) == 2
        for batch, targets in step:
            assert isinstance(batch, ImageBatch) and len(targets) == 2
            assert batch.images.dtype == torch.uint8 and batch.mask.dtype == torch.bool
            assert batch.images.shape[-1] % 8 == batch.images.shape[-2] % 8 == 0
            for target, mask in zip(targets, batch.mask, strict=True):
                assert isinstance(target, Target)
                assert int((~mask).sum()) == target.size[0] * target.size[1]


@pytest.mark.process
def test_batches_do_not_depend_on_the_number_of_workers(dataset: CocoDetection) -> None:
    plain, one, two = (train_loader(dataset, workers=workers) for workers in (0, 1, 2))
    for epoch in (0, 5):
        expected = list(plain.epoch(epoch))
        assert_same(expected, list(one.epoch(epoch)))
        assert_same(expected, list(two.epoch(epoch)))


def test_skipped_steps_are_not_read_and_the_rest_is_the_same(dataset: CocoDetection, patch: Patch) -> None:
    loader = train_loader(dataset)
    everything = list(loader.epoch(3))
    read: list[tuple[int, int]] = []
    original = CocoDetection.before_resize
    patch(CocoDetection, "before_resize", lambda self, sample: read.append(sample) or original(self, sample))
    assert_same(everything[3:], list(loader.epoch(3, skip=3)))
    assert len(read) == 2 * 4
    assert list(loader.epoch(3, skip=5)) == []


def test_ranks_and_accumulation_share_the_same_global_batches(dataset: CocoDetection) -> None:
    whole = list(train_loader(dataset, batch=4, accumulate=1).epoch(2))
    for batch, accumulate, world in ((2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)):
        ranks = [list(train_loader(dataset, batch, accumulate, rank, world).epoch(2)) for rank in range(world)]
        for step, expected in enumerate(whole):
            assert ids([rank[step] for rank in ranks]) == ids([expected])


def test_an_abandoned_epoch_does_not_leak_into_the_next(dataset: CocoDetection) -> None:
    loader = train_loader(dataset, workers=2)
    unfinished = loader.epoch(0)
    next(unfinished)
    assert_same(list(loader.epoch(1)), list(train_loader(dataset).epoch(1)))


@pytest.mark.process
def test_workers_stay_alive_between_epochs_and_end_with_the_loader(dataset: CocoDetection) -> None:
    loader = train_loader(dataset, workers=2)
    list(loader.epoch(0))
    pids = worker_pids(loader)
    list(loader.epoch(1))
    assert worker_pids(loader) == pids and all(alive(pid) for pid in pids)
    del loader
    wait_until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_do_not_move(dataset: CocoDetection, workers: int) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    loader = train_loader(dataset, workers=workers)
    list(loader.epoch(0))
    list(eval_loader(dataset, 2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_sees_every_image_and_all_ranks_equally_many(dataset: CocoDetection) -> None:
    for workers, world, batch in ((0, 1, 1), (2, 1, 3), (0, 4, 2)):
        loaders = [eval_loader(dataset, batch, rank, world, workers) for rank in range(world)]
        seen = [[target.image_id for _, targets in loader for target in targets] for loader in loaders]
        assert len({len(part) for part in seen}) == 1
        assert {image_id for part in seen for image_id in part} == set(dataset.image_ids)
        assert [len(loader) for loader in loaders] == [-(-len(part) // batch) for part in seen]
    assert [target.image_id for _, targets in eval_loader(dataset) for target in targets] == list(range(22))


def test_evaluation_can_be_repeated(dataset: CocoDetection) -> None:
    loader = eval_loader(dataset, 3, workers=2)
    assert_same([list(loader)], [list(loader)])


@pytest.fixture
def broken(dataset: CocoDetection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CocoDetection:
    """The same data set with a damaged image 13."""
    monkeypatch.setattr(image_files, "RETRY_SECONDS", ())
    for path in dataset.folder.iterdir():
        os.symlink(path, tmp_path / path.name)
    (tmp_path / "13.png").unlink()
    (tmp_path / "13.png").write_bytes(b"")
    return CocoDetection(tmp_path, dataset.annotations, EvalTransform(20, 64), seed=0)


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_in_a_worker_arrives_as_one_clean_sentence(broken: CocoDetection, workers: int) -> None:
    for batches in (train_loader(broken, workers=workers).epoch(0), iter(eval_loader(broken, workers=workers))):
        with pytest.raises(UserError) as caught:
            list(batches)
        assert (
            str(caught.value)
            == f"image 13: {broken.folder / '13.png'} is empty: replace the file, or set --data.bad-images skip"
        )


def test_too_few_images_are_refused_before_training(dataset: CocoDetection) -> None:
    with pytest.raises(UserError, match=r"22 training images .*--train.batch-size"):
        train_loader(dataset, batch=23)


class Slow(CocoDetection):
    """Hangs at images with odd ids, until the test is over."""

    def before_resize(self, sample: tuple[int, int]) -> tuple[torch.Tensor, Target]:
        if sample[1] % 2:
            time.sleep(20)
        return super().before_resize(sample)


def hanging(dataset: CocoDetection) -> tuple[Iterator[Any], Any]:
    """Batches whose only worker hangs after the first, which is taken; and PyTorch's iterator below them."""
    loader = eval_loader(Slow(dataset.folder, dataset.annotations, dataset.transform, seed=0), workers=1)
    batches = iter(loader)
    next(batches)
    return batches, loader.workers.loader._iterator


@pytest.mark.process
@pytest.mark.faults
def test_a_killed_worker_names_the_images_in_flight(dataset: CocoDetection) -> None:
    batches, iterator = hanging(dataset)
    (worker,) = iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"ended by SIGKILL.*, while images 1, 2 were loaded: .*--data.workers"):
        next(batches)


@pytest.mark.process
@pytest.mark.faults
def test_a_hanging_worker_is_reported_with_its_images(dataset: CocoDetection) -> None:
    batches, iterator = hanging(dataset)
    iterator._timeout = 1  # not before: the first image waits for the start of the worker
    with pytest.raises(UserError, match=r"timed out after 1.* seconds, while images 1, 2 were loaded"):
        next(batches)


@pytest.mark.process
@pytest.mark.faults
def test_signals_to_the_process_group_do_not_reach_the_workers(dataset: CocoDetection) -> None:
    loader = train_loader(dataset, workers=2)
    epoch = loader.epoch(0)
    steps = [next(epoch)]
    pids = worker_pids(loader)
    assert all(os.getpgid(pid) == pid for pid in pids)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGUSR1)
    steps += list(epoch)
    assert_same(steps, list(train_loader(dataset).epoch(0)))
    assert all(alive(pid) for pid in pids)


def train_a_little(dataset: CocoDetection, end: str, pids: Connection) -> None:
    loader = train_loader(dataset, workers=2)
    epoch = loader.epoch(0)
    next(epoch)
    pids.send(worker_pids(loader))
    if end == "raise":
        raise SystemExit("in the middle of an epoch")
    if end == "wait":
        time.sleep(1000)


@pytest.mark.process
@pytest.mark.faults
@pytest.mark.parametrize("end", ["wait", "raise", "return"])
def test_no_worker_outlives_the_trainer(dataset: CocoDetection, end: str) -> None:
    receiver, sender = multiprocessing.Pipe()
    trainer = multiprocessing.get_context("fork").Process(target=train_a_little, args=(dataset, end, sender))
    trainer.start()
    pids = receiver.recv()
    assert len(pids) == 2
    if end == "wait":
        trainer.kill()
    trainer.join(timeout=30)
    assert trainer.exitcode == {"wait": -signal.SIGKILL, "raise": 1, "return": 0}[end]
    wait_until(lambda: not any(alive(pid) for pid in pids))


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_keep_their_types_and_content(dataset: CocoDetection, cuda: torch.device, workers: int) -> None:
    pinned = train_loader(dataset, workers=workers, pin=True)
    steps = list(pinned.epoch(0))
    assert_same(steps, list(train_loader(dataset).epoch(0)))
    for step in steps:
        for batch, targets in step:
            assert isinstance(batch, ImageBatch) and all(isinstance(target, Target) for target in targets)
            assert batch.images.is_pinned() and batch.mask.is_pinned()
            assert torch.equal(batch.images.to(cuda, non_blocking=True).cpu(), batch.images)
