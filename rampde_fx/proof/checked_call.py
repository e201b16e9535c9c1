"""One call of a user's model: its arguments and their names, and the one graph that Dynamo captures of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from rampde_fx.errors import CheckError, RampdeError, raising
from rampde_fx.frontend import unrewritten
from rampde_fx.frontend.marking import is_time_grid
from rampde_fx.ir import graphs
from rampde_fx.ir.captured import begins_iteration, ends_loop, has_loop
from rampde_fx.reach import reached
from rampde_fx.runtime import random_state
from rampde_fx.torch_private import capturing, repetition
from rampde_fx.validation.untouched import untouched
from rampde_fx.validation.widening import AsWritten, Twins, copies


def _tensors_of(function: Callable[..., Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a model reads beside its arguments, by name."""
    found = reached(function)
    for tensor, name in found.tensors:
        yield name, tensor
    for module, prefix in found.modules:
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                yield f"{prefix}.{name}".removeprefix("."), value


class Call:
    """A model and copies of its arguments, whose floating tensors require a gradient unless the model updates them.

    Attributes:
        leaves: The arguments' leaves, tensors copied.
        names: The user's name of each.
        trained: The names of those that require a gradient as they are given.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.function = function
        self._given, self._structure = pytree.tree_flatten((tuple(args), kwargs))
        self.names = _argument_names(function, args, kwargs)
        given = zip(self.names, self._given, strict=True)
        self.trained = {name for name, x in given if isinstance(x, torch.Tensor) and x.requires_grad}
        self.leaves = self._copies()
        updated = self._updated()
        for leaf, given in zip(self.leaves, self._given, strict=True):
            if isinstance(leaf, torch.Tensor) and graphs.has_derivatives(leaf.dtype):
                leaf.requires_grad_(id(leaf) not in updated and (torch.is_grad_enabled() or given.requires_grad))

    def __call__(self, stand_in: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
        """What the model returns; of other arguments, if something stands in for each leaf of them."""
        args, kwargs = pytree.tree_unflatten([stand_in(leaf) for leaf in self.leaves], self._structure)
        return self.function(*args, **kwargs)

    def shortened(self, times: str, steps: int) -> Call:
        """The same call with the first steps alone, by the argument that holds the times."""
        position = self.names.index(times)
        given = list(self._given)
        count = given[position].shape[0] - 1
        if not (isinstance(steps, int) and 1 <= steps <= count):
            raise CheckError(
                f"check(steps={steps!r}) where {times} has {count + 1} points",
                required=f"an int from 1 to {count}",
                fix="leave steps out to check all of them",
            )
        given[position] = given[position][: steps + 1]
        args, kwargs = pytree.tree_unflatten(given, self._structure)
        return Call(self.function, args, kwargs)

    def tensors(self) -> dict[int, tuple[torch.Tensor, str]]:
        """The tensors that have a name of the user's, by their identity."""
        found = {id(x): (x, n) for x, n in zip(self.leaves, self.names, strict=True) if isinstance(x, torch.Tensor)}
        for name, tensor in _tensors_of(self.function):
            found.setdefault(id(tensor), (tensor, name))
        return found

    def _copies(self) -> list[Any]:
        return copies(self._given, widen=False)

    def _updated(self) -> set[int]:
        """The arguments that the model updates in place; no leaf that requires a gradient can be."""
        named = [tensor for tensor, _ in self.tensors().values()]
        twins = list(zip(named, copies(named, widen=False), strict=True))
        before = {id(tensor): twin._version for tensor, twin in twins}
        for tensor, twin in twins:
            twin.requires_grad_(tensor.requires_grad and id(tensor) not in {id(leaf) for leaf in self.leaves})
        mode = Twins(twins, widen=False)
        with random_state.kept_random_state(), untouched(self.function), mode:
            self(mode.of)
        return {id(tensor) for tensor, twin in twins if twin._version != before[id(tensor)]}


def _argument_names(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """The user's name of every leaf of the arguments."""
    called = function.forward if isinstance(function, nn.Module) else function
    parameters = list(signature(called).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [(names[i] if i < len(names) else f"argument {i}", value) for i, value in enumerate(args)]
    return [
        name + pytree.keystr(path)
        for name, value in (*named, *kwargs.items())
        for path, _ in pytree.tree_flatten_with_path(value)[0]
    ]


class Captured:
    """The one graph of a call, and how the user's outputs follow from what it returns.

    Args:
        call: The call.
        prepare: Sees the graph and its fake inputs while torch can compile it; gives what runs the graph, or None.
        once: Whether loops may be captured once, as the backend has them: then prepare gives what runs them.

    Attributes:
        graph: The graph as Dynamo captured it.
        inputs: Its inputs: the copied arguments, the model's own tensors.
        names: The user's name of each input.
        arrays: The names of those that show the memory of arrays of numpy.
    """

    def __init__(
        self,
        call: Call,
        prepare: Callable[[fx.GraphModule, Sequence[Any]], AsWritten | None] = lambda *_: None,
        *,
        once: bool = False,
    ) -> None:
        self.call, self.inputs, self._returned = call, list[Any](), list[Any]()

        def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            graph_module.meta[unrewritten.BACKEND] = "check"
            self.graph = graphs.copied(graph_module)
            try:
                if not has_loop(graph_module):
                    raise _no_loop()
                self._plain = prepare(self.graph, example_inputs) or AsWritten(self.graph)
            except RampdeError as error:
                return raising(error)
            return self._first_run

        with untouched(call.function):
            before = tensor_attributes(call.function)
            try:
                given = repetition.takes_repeats(backend) if once else backend
                tree = capturing.capture(call, given, fullgraph=True)
            except capturing.Unsupported as error:
                raise _not_one_graph(error) from error
            after = tensor_attributes(call.function)
        if not self.inputs:
            raise _no_loop()
        leaves, self._structure = pytree.tree_flatten(tree)
        self._places = [self._place(leaf) for leaf in leaves]
        self._rebound = {n: self._place(x) for n, x in after.items() if before.get(n) is not x}
        known = call.tensors()
        nodes = graphs.placeholders(self.graph)
        self.names = [
            known[id(x)][1] if id(x) in known else capturing.source_name(node).removeprefix("function.function.")
            for x, node in zip(self.inputs, nodes, strict=True)
        ]
        of_numpy = map(capturing.is_of_numpy, nodes)
        self.arrays = {name for name, is_array in zip(self.names, of_numpy, strict=True) if is_array}

    @torch.compiler.disable
    def _first_run(self, *inputs: Any) -> list[Any]:
        """Run the graph on copies, so that Dynamo can build the user's outputs."""
        self.inputs = list(inputs)
        with torch.enable_grad():  # which derivatives in the model need; the copies ask for none
            self._returned = list(self._plain.run(*copies(inputs, widen=False)))
        return self._returned

    def _place(self, leaf: Any) -> tuple[str, Any]:
        """Where a leaf of the user's outputs comes from."""
        for kind, values in (("returned", self._returned), ("input", self.inputs)):
            for position, value in enumerate(values):
                if leaf is value and isinstance(leaf, torch.Tensor):
                    return kind, position
        return "constant", leaf

    def outputs(self, returned: Sequence[Any], called: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """The user's outputs, and the tensor attributes that the model replaces, from a run of the graph."""
        given = {"returned": returned, "input": called}

        def at(place: tuple[str, Any]) -> Any:
            return place[1] if place[0] == "constant" else given[place[0]][place[1]]

        tree = pytree.tree_unflatten([at(place) for place in self._places], self._structure)
        return tree, {name: at(place) for name, place in self._rebound.items()}

    def note_on_arrays(self) -> list[str]:
        """That what is written into arrays of numpy is left out: the model's own code has no copies of them."""
        names = ", ".join(sorted(self.arrays))
        return [f"what the model writes into arrays of numpy was not compared: {names}"] if names else []

    def times(self) -> str:
        """The name of the argument that the loops' times come from.

        Raises:
            CheckError: if there is no such argument, or another one.
        """
        found = self._grids()
        if len(found) != 1:
            raise CheckError(
                f"check(steps=...) cannot tell which argument holds the times: {', '.join(found) or 'none does'}",
                required="one 1-D argument of the model that steps(t) or odeint is given",
                fix="pass fewer times to check, and leave steps out",
            )
        return found[0]

    def untrained_times(self) -> frozenset[str]:
        """The names of the arguments of the loops' times that require no gradient as they are given."""
        return frozenset(self._grids()) - self.call.trained

    def _grids(self) -> list[str]:
        """The names of the arguments that the loops' times come from."""
        grids = {id(x) for x in self.call.leaves if is_time_grid(x)}
        inputs = dict(zip(graphs.placeholders(self.graph), zip(self.inputs, self.names, strict=True), strict=True))
        nodes = list(self.graph.graph.nodes)
        found_steps = list(filter(ends_loop, nodes))  # by a search, from the state
        read = graphs.ancestors([node.args[0] for node in nodes if begins_iteration(node)], found_steps)
        return [inputs[node][1] for node in inputs if node in read and id(inputs[node][0]) in grids]


def tensor_attributes(function: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """The tensors that the modules of a model hold now, by name."""
    return dict(_tensors_of(function))


def mean_square(outputs: Any) -> torch.Tensor:
    """The loss where none is given: the mean square of every floating or complex output, summed."""
    tensors = [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]
    squares = [x.abs().square().mean() for x in tensors if graphs.has_derivatives(x.dtype)]
    if not squares:
        raise CheckError(
            "the model returns no floating tensor",
            required="outputs that a loss can be computed from",
            fix="give loss=, a function of the outputs",
        )
    return torch.stack([square.to(torch.float64) for square in squares]).sum()


def _no_loop() -> CheckError:
    return CheckError(
        "the model has no loop over rampde_fx.steps(t) and no rampde_fx.odeint",
        required="a loop that the backend would rewrite",
        fix="write `for t_i, dt in rampde_fx.steps(t)`, or call rampde_fx.odeint",
    )


def _not_one_graph(error: Exception) -> CheckError:
    reason = str(error).strip().split("\n\n", maxsplit=1)[0]
    return CheckError(
        f"the model cannot be captured as one graph: {reason}",
        required="a model that torch.compile(..., fullgraph=True) takes",
        fix='move what breaks the graph out, or train with options={"verify": True}, which checks each graph',
    )


def note_on_gradients(gradients: dict[str, torch.Tensor | None], loss: Callable[[Any], torch.Tensor]) -> list[str]:
    """What a comparison of these gradients does not show.

    Raises:
        CheckError: if a loss that was given has none.
    """
    if not (gradients and torch.is_grad_enabled()):
        return []
    found = [gradient for gradient in gradients.values() if gradient is not None]
    if not found and loss is not mean_square:
        raise CheckError(
            "the loss that was given has no gradient: it does not depend on the model's outputs, or is detached",
            required="a loss through which gradients reach the parameters and inputs",
            fix="leave detach(), item() and no_grad() out of it; or call check under torch.no_grad(), for values alone",
        )
    if not found:
        return ["no output has a gradient: values alone were compared"]
    if not any(bool(gradient.any()) for gradient in found):
        return ["all gradients are zero: comparing them says nothing of the rewrite"]
    return []
