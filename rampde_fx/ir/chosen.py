"""The policy of a captured loop: as its marker says, with the dtype that its device asks for where it says "auto"."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from rampde_fx.errors import PolicyError
from rampde_fx.ir import graphs
from rampde_fx.ir.captured import begins_iteration, ends_loop
from rampde_fx.policy import MONITORED, PrecisionPolicy


def policy_at(marker: fx.Node) -> tuple[PrecisionPolicy, str]:
    """The policy of the loop that begins at a marker, which names one, and a sentence on its dtype if that was chosen.

    Raises:
        PolicyError: of "auto", where the loop has no device, several, or one of which nothing is known.
    """
    policy = PrecisionPolicy.parse(str(marker.args[-1]).removeprefix(MONITORED))
    if policy.velocity != "auto":
        return policy, ""
    found = sorted({value.device.type for value in _computed(marker)})
    if len(found) != 1:
        raise PolicyError(
            f'dtype="auto" for a loop that computes on {" and ".join(found) or "no device"}',
            required="one device, for which the dtype is chosen",
            fix="name the dtype: mixed_precision(dtype=torch.bfloat16), or torch.float16",
            where=graphs.user_line(marker),
        )
    try:
        chosen = policy.chosen_for(found[0])
    except PolicyError as error:
        raise PolicyError(error.found, required=error.required, fix=error.fix, where=graphs.user_line(marker)) from None
    return chosen, f'dtype="auto" is {chosen.velocity} on {_why(found[0], chosen)}'.replace("torch.", "")


def _why(device: str, policy: PrecisionPolicy) -> str:
    if device != "cpu":
        return f"a device of type {device}"
    return "a CPU with" + ("out" if policy.velocity is torch.float32 else "") + " arithmetic for bfloat16"


def _computed(marker: fx.Node) -> Iterator[torch.Tensor]:
    """The floating tensors that a loop computes; 0-d ones if there are no others, for times may lie elsewhere."""
    own: list[torch.Tensor] = []
    node = marker.next
    while node.op != "root" and not ends_loop(node):
        value = graphs.value(node)
        if isinstance(value, torch.Tensor) and graphs.has_derivatives(value.dtype) and not begins_iteration(node):
            own.append(value)
        node = node.next
    large = [value for value in own if value.ndim]
    yield from large or own
