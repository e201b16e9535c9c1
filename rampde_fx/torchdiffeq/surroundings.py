"""What a computation depends on beside its inputs: generators, autocast, buffers, modes, the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from rampde_fx.solvers.runge_kutta import State
from rampde_fx.torch_private.function_modes import active_modes
from rampde_fx.torchdiffeq.kept_buffers import Before, Buffers, Keep


class Random(NamedTuple):
    """The states of the generators of random numbers."""

    device_type: str
    devices: list[int]
    states: list[torch.Tensor]

    def equals(self, other: Random) -> bool:
        """Whether nothing was drawn in between."""
        return self[:2] == other[:2] and all(map(torch.equal, self.states, other.states))

    def restore(self) -> None:
        """Draw what was drawn from here on."""
        torch.set_rng_state(self.states[0])
        if self.devices:
            set_device_states(self.devices, self.states[1:], device_type=self.device_type)


def random_of(states: tuple[State, ...]) -> Random:
    """Those of the host, and of the states' device."""
    leaves = [leaf for state in states for leaf in state]
    devices, found = get_device_states(*leaves)
    return Random(leaves[0].device.type, list(devices), [torch.get_rng_state(), *found])


def autocasts_of(states: tuple[State, ...]) -> list[dict[str, Any]]:
    """The settings of autocast, of the host and of the states' device."""
    types = {"cpu", *(leaf.device.type for state in states for leaf in state)}
    return [
        {
            "device_type": name,
            "enabled": torch.is_autocast_enabled(name),
            "dtype": torch.get_autocast_dtype(name),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for name in sorted(types)
        if torch.amp.is_autocast_available(name)
    ]


class Surroundings(NamedTuple):
    """What a computation depends on beside its inputs."""

    random: Random
    autocasts: list[dict[str, Any]]
    buffers: Buffers
    before: Before
    threads: int
    modes: tuple[Any, ...]  # of torch.overrides, torch.device(...) among them

    @contextmanager
    def again(self, keep: Keep) -> Iterator[None]:
        """As they were, with gradients; what this computation has made may be kept."""
        random = self.random
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.random.fork_rng(random.devices, device_type=random.device_type))
            random.restore()
            for settings in self.autocasts:
                stack.enter_context(torch.autocast(**settings))
            active = active_modes()
            for mode in self.modes:
                if not any(mode is other for other in active):
                    stack.enter_context(mode)
            stack.enter_context(self.buffers.brought_back(self.before, keep))
            yield stack.enter_context(torch.enable_grad())
