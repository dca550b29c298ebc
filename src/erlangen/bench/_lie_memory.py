"""Peak memory of one case, measured in a process of its own.

On Linux it is the highest resident memory (VmHWM of /proc/self/status) less what was resident just before the call.
Not ``ru_maxrss``: a process starts with that of the one which started it. On CUDA it is what torch allocated.
"""

import ctypes
import multiprocessing
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ._lie_case import PASSES, Case, Pass

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SMALL = 16


def free_memory(device: str) -> float:
    """Bytes that are free on the device; infinite where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with suppress(OSError):
        if found := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            return 1024 * int(found[1])
    return float("inf")


def peak_memory(case: Case, limit: float) -> dict[Pass, float | str | None]:
    """Peak memory above the inputs of each pass.

    Args:
        case: what to run.
        limit: bytes that it may take.

    Returns:
        Bytes; None where the system does not tell; or, in words, why the pass does not run.
    """
    free = free_memory(case.device)
    allowed = min(limit, free)
    context = multiprocessing.get_context("forkserver")  # which imports torch once, and starts no thread
    # Also what torch imports at the first call of a custom operator; a name that is not there is passed over.
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(case, int(allowed), theirs))
    found: dict[Pass, float | str | None] = {}
    try:
        with _interrupted_afterwards():
            process.start()
        theirs.close()
        with suppress(EOFError):
            while True:
                found |= ours.recv()
        process.join()
    finally:
        if process.pid is not None:
            process.kill()
    status = process.exitcode or 0
    ended = f"its process ended by itself, with status {status}"
    if status < 0:
        ended = f"its process was ended by {signal.Signals(-status).name}"
    too_much = f"it needs more than {'the limit of' if limit <= free else 'what is free,'} {allowed / 1e9:.3g} GB"
    return {which: too_much if (r := found.get(which, ended)) == "memory" else r for which in PASSES}


@contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C in here takes effect at the end: a process that is half started would show a traceback of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def later(*_: Any) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _measure(case: Case, limit: int, results: Connection) -> None:
    """Send a mapping for each pass: its bytes, "memory" if they would be more than the limit, or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the process that started us to report
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    cuda = case.device == "cuda"
    torch.set_num_threads(case.threads)
    try:
        # Code that is loaded on first use, at a size that needs no memory.
        for call in replace(case, size=_SMALL).passes().values():
            call()
    except Exception as error:
        results.send({which: _reason(error) for which in PASSES})
        return
    passes = case.passes()
    if cuda:
        total = torch.cuda.mem_get_info()[1]
        allowed = (torch.cuda.memory_reserved() + limit) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed))
    elif _STATUS.exists():
        allowed = _status("VmData") + limit
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    for which, call in passes.items():
        try:
            if cuda or case.variant.startswith("compiled"):
                call()  # kernels are compiled for each size
            results.send({which: _peak_on_cuda(call) if cuda else _peak(call)})
        except Exception as error:
            results.send({which: _reason(error)})


def _peak(call: Callable[[], Any]) -> int | None:
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory freed before the call is not the call's to use again
    try:
        _RESET.write_text("5")  # the peak so far is forgotten
    except OSError:
        call()
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _peak_on_cuda(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return "memory"
    return (text or type(error).__name__)[:300]
