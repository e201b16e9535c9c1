"""Time, bytes, synchronisations and arithmetic of a training step."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20
WATCHED = "rampde_fx: watched"
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_step(loss: Callable[[], torch.Tensor], model: nn.Module) -> torch.Tensor:
    """The loss and its gradients, without an optimizer."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value.detach().clone()  # a CUDA graph of torch's overwrites it in the next step


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run, the device's work included."""
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begin


def saved_bytes(run: Callable[[], object], model: nn.Module | None = None) -> int:
    """Bytes of the distinct tensors, other than a model's parameters, that a forward leaves for the backward."""
    tensors = saved_tensors(run, [] if model is None else model.parameters())
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def saved_tensors(run: Callable[[], object], held: Iterable[torch.Tensor] = ()) -> list[torch.Tensor]:
    """The tensors that a forward leaves for the backward, one for each memory that is not of the held ones."""
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            saved[place] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()  # the tensors stay alive, so that no address is used twice
    del kept
    return list(saved.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that a run takes above what was there before: of the device, or resident of the process."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what the run takes
    before = _resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def host_synchronisations(run: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for the device during a run, by the profiler; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronise(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first profile of a process waits for itself
        with torch.profiler.profile(activities=activities) as profile, torch.profiler.record_function(WATCHED):
            run()
    return waits(profile.events())


def waits(events: Iterable[Any]) -> int:
    """How many events of a profile are waits within the watched range: a profiler itself waits when it ends."""
    events = list(events)
    watched = [e.time_range for e in events if e.name == WATCHED and e.device_type == torch.autograd.DeviceType.CPU]
    return sum(e.name in WAITS and any(r.start <= e.time_range.start <= r.end for r in watched) for e in events)


def scheme_flops(run: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """Floating-point operations of matrix products and convolutions: forward, recomputation and backward.

    Args:
        run: The loss of the model, uncompiled.
        model: The model.
    """
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        run()
    with FlopCounterMode(display=False) as both:
        training_step(run, model)
    return int(forward.get_total_flops() + both.get_total_flops())


def product_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """The best rate of square matrix products in a dtype, in floating-point operations a second."""
    best = 0.0
    for n in (2048, 4096, 8192) if device.type == "cuda" else (256, 512, 1024):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        once = max(timed(lambda a=a, b=b: a @ b, device) for _ in range(2))
        count = max(1, round(seconds / max(once, 1e-6) / 3))

        def products(a: torch.Tensor = a, b: torch.Tensor = b, count: int = count) -> None:
            for _ in range(count):
                a @ b

        best = max(best, 2 * n**3 * count / timed(products, device))
    return best
