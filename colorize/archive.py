"""Many pictures, as fast as the machine can: some are read or written while others are in the network; in bounded memory."""

import ctypes
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import torch

from .colorizer import Colorizer
from .picture import PictureError, read, weigh

TOGETHER = 32  # pictures that a worker takes at once: the network gets batches of those that have one shape
LOAD = 2**26  # bytes that they weigh together, unless it is a single picture
MEMORY = 2**28  # bytes in work at once, a core; a picture that weighs more than all of it waits until it is alone


def colorize_files(
    jobs: Sequence[tuple[Path, Path]], colorizer: Colorizer, size: int | None = None, saturation: float = 1.0
) -> Iterator[tuple[Path, str | None]]:
    """Colour files: (picture, result) pairs. Closing the iterator, or Ctrl-C, stops at once and leaves whole files only.

    Every core has a worker that reads, colours and writes, with a thread of torch's each: that keeps the cores busier than one
    network with a thread a core does. OpenCV's number of threads is set for the process.

    Yields:
        Each picture, in no order, with what went wrong or None.
    """
    todo, done, stopped = deque(jobs), queue.SimpleQueue(), threading.Event()
    turn, room, held = threading.Lock(), threading.Condition(), 0
    cores, before = _cores(), torch.get_num_threads()
    workers = min(cores + 1, len(jobs))  # one more, as one of them waits for a disk or a GPU
    together = min(TOGETHER, -(-len(jobs) // max(workers, 1)))
    threads = max(cores // max(workers, 1), 1)

    def take() -> tuple[list[tuple[Path, Path]], int]:
        nonlocal held
        taken, weight = [], 0
        with turn:  # one after the other, or a large picture would wait for as long as small ones come
            while todo and len(taken) < together:
                more = weigh(todo[0][0])
                if taken and weight + more > LOAD:
                    break
                taken.append(todo.popleft())
                weight += more
            with room:
                while held and held + weight > MEMORY * cores and not stopped.is_set():
                    room.wait(0.1)
                held += weight
        return taken, weight

    def work() -> None:
        nonlocal held
        torch.set_num_threads(threads)
        with suppress(KeyboardInterrupt):
            while not stopped.is_set():
                taken, weight = take()
                if not taken:
                    break
                for outcome in _colorize(taken, colorizer, size, saturation):
                    done.put(outcome)
                with room:
                    held -= weight
                    room.notify_all()

    cv2.setNumThreads(threads)
    crew = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    try:
        for thread in crew:
            thread.start()
        for _ in jobs:
            yield done.get()
    except BaseException:  # Ctrl-C reaches the main thread alone; told so, the others remove what is half written
        todo.clear()
        stopped.set()
        for thread in crew:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt))
        raise
    finally:
        torch.set_num_threads(before)  # or threads to come would have the workers' number
        patience = time.monotonic() + 30
        while any(thread.is_alive() for thread in crew) and time.monotonic() < patience:
            with suppress(KeyboardInterrupt):  # a launcher passes Ctrl-C on once more
                time.sleep(0.01)


def _colorize(
    jobs: Sequence[tuple[Path, Path]], colorizer: Colorizer, size: int | None, saturation: float
) -> Iterator[tuple[Path, str | None]]:
    """Some of the files together, or each for itself if together they fail."""
    pictures = []
    for job in jobs:
        try:
            pictures.append((job, read(job[0])))
        except Exception as error:
            yield job[0], _reason(job[0], error)
    results, reason = [], None
    try:
        results = colorizer([picture for _, picture in pictures], size, saturation)
    except Exception as error:  # the memory is full, most likely: it is free again only when the error is gone
        reason = _reason(jobs[0][0], error)
    if reason and len(jobs) == 1:
        yield jobs[0][0], reason
    elif reason:
        jobs = [job for job, _ in pictures]
        pictures.clear()
        for job in jobs:
            yield from _colorize([job], colorizer, size, saturation)
    for ((source, target), _), result in zip(pictures, results, strict=False):  # no results, where it failed
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            result.save(target)
            yield source, None
        except Exception as error:
            yield source, _reason(source, error)


def _reason(source: Path, error: Exception) -> str:
    """One line that names the picture."""
    if isinstance(error, PictureError):
        return str(error)
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{source}: {'out of memory' if isinstance(error, MemoryError) else text}"


def _cores() -> int:
    """As many as torch would use; of a launch, which sets that to 1, as many as there are for each of its processes."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ["LOCAL_WORLD_SIZE"]), 1)
