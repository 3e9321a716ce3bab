"""Processes that load batches ahead, and what can happen to them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from detr_fabric.data.batch import ImageBatch, MicroBatch, Target
from detr_fabric.data.sampler import SampleKey
from detr_fabric.errors import UserError

Load = Callable[[list[SampleKey]], list[MicroBatch]]
_PackedTarget = tuple[np.ndarray, np.ndarray, tuple[Any, ...]]  # labels, boxes, and the rest of a Target
_Packed = list[tuple[ImageBatch, list[_PackedTarget]]] | UserError

PREFETCH = 2  # batches that each worker loads ahead
FEWER = "lower --data.workers"
SHARED_MEMORY = "/dev/shm"
TOO_MANY_FILES = os.strerror(errno.EMFILE)
TIMEOUT = 600  # seconds for one batch, after which the file system must be hanging


class Workers:
    """Loads lists of samples in order, in `count` processes that live as long as this object (0: in this process)."""

    def __init__(self, load: Load, image_ids: np.ndarray, count: int, pin_memory: bool) -> None:
        """load: reads the samples of a batch; image_ids: of all images by index, for messages."""
        self.image_ids = image_ids
        self.order = _Order()
        self.in_flight = max(1, PREFETCH * count)
        self.loader = DataLoader(
            _Batches(load),
            batch_size=None,  # an item is a whole batch already
            sampler=self.order,
            num_workers=count,
            prefetch_factor=PREFETCH if count > 0 else None,
            collate_fn=_unchanged,
            worker_init_fn=_leave_process_group,
            generator=torch.Generator(),  # without its own, every epoch would move the global generator
            persistent_workers=count > 0,
            timeout=TIMEOUT if count > 0 else 0,
            pin_memory=pin_memory,
        )

    def read(self, order: list[list[SampleKey]]) -> Iterator[list[MicroBatch]]:
        """The batches of `order`, each as `load` returns it. Raises load's UserError, or one for a worker that died or
        hangs."""
        self.order.batches = order
        results = self._start()
        for position in range(len(order)):
            try:
                with _Waiting():
                    result: _Packed = next(results)
            except (RuntimeError, OSError, EOFError) as error:
                reason = _exhausted(str(error)) or _left(getattr(results, "_workers", ()))
                if reason is not None:
                    raise reason from error
                if str(error).startswith("DataLoader "):
                    lost = order[position : position + self.in_flight]
                    raise self._lost(_killed(getattr(results, "_workers", ())) or str(error), lost) from error
                raise
            if isinstance(result, UserError):
                raise result
            yield [(images, [_unpacked(target) for target in targets]) for images, targets in result]

    def _start(self) -> Iterator[_Packed]:
        """Raises UserError where no process can be started."""
        try:
            results: Iterator[_Packed] = iter(self.loader)
            _Waiting.listen()
            return results
        except OSError as error:
            hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
            traceback.clear_frames(error.__traceback__)  # torch's half-made iterator fails when it is deleted
            sys.unraisablehook = hook
            reason = f"no process can be started that loads images ({error.strerror}): {FEWER}"
            raise _exhausted(str(error)) or UserError(reason) from None

    def _lost(self, reason: str, batches: list[list[SampleKey]]) -> UserError:
        ids = [str(self.image_ids[index]) for keys in batches for _, index in keys]
        names = ", ".join(ids[:16]) + (", ..." if len(ids) > 16 else "")
        reason = reason.splitlines()[0].rstrip(".")
        return UserError(f"{reason}, while images {names} were loaded: check these files, or {FEWER}")


def _exhausted(reason: str) -> UserError | None:
    """The limit of the machine, and its cure, if it was one that kept a batch from reaching the trainer."""
    if "No space left on device" in reason:
        size = shutil.disk_usage(SHARED_MEMORY).total / 2**20
        return UserError(
            f"{SHARED_MEMORY} ({size:,.1f} MB), through which batches come from --data.workers, is full: start a "
            f"container with --ipc=host or a larger --shm-size, or {FEWER}; 0 needs none"
        )
    if TOO_MANY_FILES in reason:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return UserError(
            f"{limit} open files, the limit of a process, are too few: raise it by `ulimit -n`, or {FEWER}"
        )
    return None


def _killed(workers: Iterable[BaseProcess]) -> str | None:
    """Which signal ended a worker."""
    codes = [worker.exitcode for worker in workers if worker.exitcode is not None and worker.exitcode < 0]
    if not codes:
        return None
    memory = ", perhaps because memory ran out" if -codes[0] == signal.SIGKILL else ""
    return f"a process that loads images was ended by {signal.Signals(-codes[0]).name}{memory}"


def _left(workers: Iterable[BaseProcess]) -> UserError | None:
    """The reason why workers have ended by themselves, see _end_without_files."""
    for worker in workers:
        worker.join(0.5)  # it may have closed its connections a moment before it ends
        if worker.exitcode == 0:
            return _exhausted(TOO_MANY_FILES)
    return None


def _say_instead(queue: Any, error: Exception, item: Any) -> None:
    """Sends the reason in the place of a batch that could not be sent; else the trainer would wait until TIMEOUT.

    Called in the thread in which a worker's queue writes, with the item that it has dropped.
    """
    number, _ = item
    queue.put((number, _exhausted(str(error)) or UserError(f"a batch could not leave its worker ({error}): {FEWER}")))


class _Waiting:
    """While this process waits for a batch, the death of a worker ends the wait with torch's error. At other times
    torch's handler would raise that error in the midst of a training step; it is then raised at the next wait."""

    handler: Callable[[int, FrameType | None], Any] | None = None  # torch's, of SIGCHLD
    now = False
    missed = False

    @classmethod
    def listen(cls) -> None:
        current = signal.getsignal(signal.SIGCHLD)
        if callable(current) and current != cls.heard and threading.current_thread() is threading.main_thread():
            cls.handler = current
            signal.signal(signal.SIGCHLD, cls.heard)

    @classmethod
    def heard(cls, number: int, frame: FrameType | None) -> None:
        if cls.now and cls.handler is not None:
            cls.handler(number, frame)
        else:
            cls.missed = True

    def __enter__(self) -> None:
        _Waiting.now = True
        if _Waiting.missed and _Waiting.handler is not None:
            _Waiting.missed = _Waiting.now = False
            _Waiting.handler(signal.SIGCHLD, None)  # raises, or a child of another kind has ended
            _Waiting.now = True

    def __exit__(self, *_: object) -> None:
        _Waiting.now = False


class _Order:
    """The samples of the current pass. The main process reads them, so they can change between passes."""

    def __init__(self) -> None:
        self.batches: list[list[SampleKey]] = []

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Batches(Dataset[_Packed]):
    """Runs `load` and packs the targets. A UserError is returned instead of raised, because DataLoader would bury its
    sentence in the worker's traceback."""

    def __init__(self, load: Load) -> None:
        self.load = load

    def __getitem__(self, keys: list[SampleKey]) -> _Packed:
        try:
            return [(images, [_packed(target) for target in targets]) for images, targets in self.load(keys)]
        except UserError as error:
            return error


def _packed(target: Target) -> _PackedTarget:
    """Arrays leave a worker by value. A tensor would take a file descriptor and 0.2 ms."""
    return target.labels.numpy(), target.boxes.numpy(), target[2:]


def _unpacked(packed: _PackedTarget) -> Target:
    labels, boxes, rest = packed
    return Target(torch.from_numpy(labels), torch.from_numpy(boxes), *rest)


def _unchanged(batch: Any) -> Any:
    return batch


def _end_without_files(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends a worker that can't hand over its open files, because it has too many: it would try for ever."""
    if TOO_MANY_FILES in str(error):
        os._exit(0)  # with another code torch would raise an error in the midst of a training step
    sys.__excepthook__(kind, error, trace)


def _leave_process_group(worker: int) -> None:
    """Makes the trainer's own SIGTERM the only signal that ends a worker. Ctrl+C signals the whole process group and
    SLURM every process of a job, but the trainer still needs its workers to finish its step."""
    os.setpgid(0, 0)
    Queue._on_queue_feeder_error = _say_instead  # type: ignore[attr-defined]
    sys.excepthook = _end_without_files
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is not None and hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_sigterm, args=(trainer.pid,), daemon=True).start()


def _wait_for_sigterm(sender: int) -> None:
    """A signal handler would not learn who sent the signal, and would not run during a call that hangs."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)
