"""How much memory the loops of a graph may spend on activations, where checkpoint="auto" leaves it to the compiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from rampde_fx.errors import PolicyError
from rampde_fx.ir import graphs
from rampde_fx.ir.ends import ActivationSlot, places
from rampde_fx.ir.loops import KeptLoop, Loop
from rampde_fx.schedules import MemoryBudget
from rampde_fx.torch_private import shapes

MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # what a container is given, by control groups of version 2


class Budgets:
    """What the loops of one graph may keep: what one of them keeps, those behind it cannot spend."""

    def __init__(self) -> None:
        self._free: dict[torch.device, int] = {}
        self._kept: Counter[torch.device] = Counter()

    def of(self, loop: Loop) -> int | None:
        """How many bytes a loop may keep; None where its policy names no budget, or nothing is differentiated.

        Raises:
            PolicyError: of a share, on a device of which it is not known how much memory is free.
        """
        budget = loop.policy.schedule
        if not isinstance(budget, MemoryBudget) or not loop.differentiated:
            return None
        device = _device_of(loop)
        whole = budget.max_bytes
        if whole is None:
            if device not in self._free:  # once, so that all loops have shares of the same
                self._free[device] = _free_bytes(device, loop.where)
            whole = int(budget.share_in_force * self._free[device])
        return max(0, whole - self._kept[device])

    def spend(self, loop: KeptLoop) -> None:
        """Note what a loop with a budget keeps."""
        if loop.budget is not None:
            self._kept[_device_of(loop)] += kept_bytes(loop)


def kept_bytes(loop: KeptLoop) -> int:
    """Bytes of activations that a loop keeps in all its steps, by the sizes at the capture where these may change."""
    return sum(shapes.size_hint(number) for number in bytes_of(loop, activations(loop)))


def bytes_of(loop: Loop, values: Iterable[torch.Tensor]) -> list[int | torch.SymInt]:
    """The bytes of values of a step, in all steps."""
    return [loop.steps * value.numel() * value.itemsize for value in values]


def activations(loop: KeptLoop) -> list[torch.Tensor]:
    """The activations that a step of a loop stores."""
    stored = zip(places(loop.slots), loop.results().stored, strict=True)
    return [graphs.value(node) for place, node in stored if isinstance(loop.slots[place.slot], ActivationSlot)]


def _device_of(loop: Loop) -> torch.device:
    """Where a loop's states lie."""
    states = [graphs.value(node) for node in loop.inputs().carries]
    return next((x.device for x in states if graphs.has_derivatives(x.dtype)), states[0].device)


def _free_bytes(device: torch.device, where: str) -> int:
    """How much memory a device has left, what torch has reserved and does not use included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and (free := _free_bytes_of_host()) is not None:
        return free
    raise PolicyError(
        f'checkpoint="auto" for a loop on {device}, of which it is not known how much memory is free',
        required="a CUDA device, or the CPU of a Linux machine, or a budget in bytes",
        fix="name it: PrecisionPolicy(checkpoint=rampde_fx.MemoryBudget(max_bytes=2**30))",
        where=where,
    )


def _free_bytes_of_host() -> int | None:
    """What Linux can give without swapping, and the control group of the process allows; None on other systems."""
    numbers = _numbers(MEMORY)
    if "MemAvailable:" not in numbers:
        return None
    free = 1024 * numbers["MemAvailable:"]
    limit, used = _number(GROUP / "memory.max"), _number(GROUP / "memory.current")
    if limit is None or used is None:
        return free
    cache = _numbers(GROUP / "memory.stat").get("inactive_file", 0)  # given back when it is asked for
    return min(free, max(0, limit - used + cache))


def _numbers(file: Path) -> dict[str, int]:
    """The numbers of a file by the names before them."""
    rows = [line.split() for line in _text(file).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
