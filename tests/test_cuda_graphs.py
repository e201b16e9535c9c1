"""Loops as CUDA graphs, on the CPU: a recording of operators, run again on the same memory, stands for the graph."""

import copy
import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import rampde_fx
from rampde_fx.emit import cuda_graphs
from rampde_fx.errors import CaptureError, PolicyError
from rampde_fx.torch_private import inductor
from tests.comparison import compiled, gradients, relative_errors
from tests.models import Euler
from tests.test_scaling import Steep


class Recording(TorchDispatchMode):
    """As a CUDA graph: the operators on tensors that are not scalars, with the memory they read and wrote."""

    def __init__(self):
        super().__init__()
        self.tape = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_flatten((args, kwargs, result))[0] if isinstance(leaf, torch.Tensor)]
        if any(tensor.ndim for tensor in tensors):
            self.tape.append((func, args, kwargs, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.tape:
            new = func(*args, **kwargs)
            for old, value in zip(tree_flatten(result)[0], tree_flatten(new)[0], strict=True):
                if old.data_ptr() != value.data_ptr():  # neither a view nor in place
                    old.copy_(value)


@pytest.fixture
def captures(monkeypatch):
    """Captures on the CPU, by recording; how many there were."""
    found = []

    def capture(run):
        with Recording() as recording:
            results = run()
        found.append(recording)
        return recording.replay, results

    monkeypatch.setattr(cuda_graphs, "DEVICES", {"cpu"})
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    return found


def loop_of(steps=3):
    """y <- y + w k at step k, each y written to a row of the stack; and how often the host ran the body."""
    ran = []

    def cond(args):
        k = args[0]
        args.clear()
        return (k < steps,)

    def body(args):
        k, stack, y, same, w = args
        args.clear()
        ran.append(int(k))
        y = y + w * float(k)
        stack[int(k)].copy_(y)
        return k + 1, stack, y, same

    return cond, body, ran


def arguments(seed, size=2):
    generator = torch.Generator().manual_seed(seed)
    y, w, same = (torch.randint(-9, 9, (size,), generator=generator).float() for _ in range(3))  # exact sums
    return [torch.zeros((), dtype=torch.int64), torch.empty(3, size), y, same], [w]


def check(carried, additional, results):
    (_, stack, y, same), (w,) = carried, additional
    count, stored, final, passed = results
    rows = torch.stack([y, y + w, y + 3 * w])
    assert count.item() == 3
    assert stored is stack
    assert torch.equal(stack, rows)
    assert torch.equal(final, rows[-1])
    assert passed is same


class TestRunLoop:
    def test_step_by_step_then_captured_then_replayed(self, captures):
        cond, body, ran = loop_of()
        finals = []
        for seed, (runs, graphs) in enumerate([(3, 0), (6, 1), (6, 1), (6, 1)]):
            carried, additional = arguments(seed)
            given = [value.clone() for value in (*carried[2:], *additional)]
            results = cuda_graphs.run_loop(cond, body, carried, additional, [1])
            check(carried, additional, results)
            assert (len(ran), len(captures)) == (runs, graphs)
            assert all(map(torch.equal, given, (*carried[2:], *additional)))  # only what is mutated changes
            finals.append((results[2], results[2].clone()))
        assert all(torch.equal(*pair) for pair in finals)  # a later replay leaves earlier results alone

    def test_each_shape_and_each_number_on_the_host_has_a_graph_of_its_own(self, captures):
        cond, body, _ = loop_of()
        for _ in range(2):
            for size in (2, 4):
                carried, additional = arguments(0, size)
                check(carried, additional, cuda_graphs.run_loop(cond, body, carried, additional, [1]))
        assert len(captures) == 2
        for _ in range(2):
            carried, additional = arguments(0)
            carried[0] += 1  # starts at the second step
            assert torch.equal(
                cuda_graphs.run_loop(cond, body, carried, additional, [1])[2], carried[2] + 3 * additional[0]
            )
        assert len(captures) == 3

    def test_many_shapes_are_not_all_captured(self, captures):
        cond, body, _ = loop_of()
        for _ in range(2):
            for size in range(1, cuda_graphs.MOST_GRAPHS + 4):
                carried, additional = arguments(0, size)
                check(carried, additional, cuda_graphs.run_loop(cond, body, carried, additional, [1]))
        assert len(captures) == cuda_graphs.MOST_GRAPHS

    def test_numbers_seen_once_are_forgotten(self, captures):
        cond, body, _ = loop_of(0)
        for number in range(cuda_graphs.MOST_SEEN + 9):
            cuda_graphs.run_loop(cond, body, [torch.tensor(number)], [torch.ones(2)], [])
        assert len(cuda_graphs._captured[body]) == cuda_graphs.MOST_SEEN
        assert captures == []

    def test_a_loop_inside_is_part_of_the_graph(self, captures):
        cond, body, ran = loop_of()

        def outer_cond(args):
            return (args[0] < 2,)

        def outer(args):
            k, y, w = args
            _, _, y, _ = cuda_graphs.run_loop(cond, body, [torch.zeros_like(k), torch.empty(3, 2), y, w], [w], [1])
            return k + 1, y

        for _ in range(4):
            y, w = torch.ones(2), torch.full((2,), 2.0)
            result = cuda_graphs.run_loop(outer_cond, outer, [torch.zeros((), dtype=torch.int64), y], [w], [])
            assert torch.equal(result[1], y + 6 * w)
        assert (len(captures), len(ran)) == (1, 12)

    def test_inference_mode_is_not_captured(self, captures):
        cond, body, _ = loop_of()
        with torch.inference_mode():
            for _ in range(3):
                carried, additional = arguments(0)
                check(carried, additional, cuda_graphs.run_loop(cond, body, carried, additional, [1]))
        assert captures == []

    def test_clear(self, captures):
        cond, body, _ = loop_of()
        for _ in range(2):
            cuda_graphs.run_loop(cond, body, *arguments(0), [1])
        cuda_graphs.clear()
        assert len(cuda_graphs._captured) == 0
        carried, additional = arguments(1)
        check(carried, additional, cuda_graphs.run_loop(cond, body, carried, additional, [1]))

    def test_overlapping_memory_is_not_captured(self, captures):
        cond, body, _ = loop_of()
        for _ in range(3):
            carried, additional = arguments(0)
            additional = [additional[0][:1].expand(2)]
            check(carried, additional, cuda_graphs.run_loop(cond, body, carried, additional, [1]))
        assert captures == []

    def test_a_loop_without_steps(self, captures):
        cond, body, ran = loop_of(0)
        for _ in range(3):
            carried, additional = arguments(0)
            results = cuda_graphs.run_loop(cond, body, carried, additional, [])
            assert torch.equal(results[2], carried[2])
            assert results[2] is not carried[2]
        assert ran == []

    def test_other_devices_run_step_by_step(self):
        cond, body, ran = loop_of()
        for _ in range(3):
            carried, additional = arguments(0)
            check(carried, additional, cuda_graphs.run_loop(cond, body, carried, additional, [1]))
        assert len(ran) == 9

    def test_a_graph_lives_as_long_as_the_code(self, captures):
        cond, body, _ = loop_of()
        before = len(cuda_graphs._captured)
        for _ in range(2):
            cuda_graphs.run_loop(cond, body, *arguments(0), [1])
        assert len(cuda_graphs._captured) == before + 1
        captures.clear()
        del cond, body
        assert len(cuda_graphs._captured) == before

    def test_what_cannot_be_captured(self, captures, monkeypatch):
        def capture(run):
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(cuda_graphs, "capture", capture)
        cond, body, _ = loop_of()
        cuda_graphs.run_loop(cond, body, *arguments(0), [1])
        with pytest.raises(CaptureError, match="when stream is capturing") as found:
            cuda_graphs.run_loop(cond, body, *arguments(0), [1])
        assert "max-autotune-no-cudagraphs" in found.value.fix


class TestLaunchesAlone:
    """Which loops can be captured, seen from the graphs of a condition and of a body on a GPU."""

    @staticmethod
    def involved(body):
        mode = FakeTensorMode()
        with mode:
            values = [torch.zeros((), dtype=torch.int64), torch.empty(3, device="cuda:0")]
        with mode:
            traced = make_fx(body)(*values)
        return any(cuda_graphs._involves_host(node) for node in traced.graph.nodes)

    def test_launches(self):
        assert not self.involved(lambda k, y: (k + 1, y * 2))

    def test_a_value_that_reaches_the_host(self):
        assert self.involved(lambda k, y: (k + 1, (y * 2).to("cpu")))

    def test_a_condition_on_the_device(self):
        """As of a search for adaptive steps: the host waits for it in every step."""

        def subgraph(function):
            with FakeTensorMode():
                values = [torch.zeros((), dtype=torch.int64), torch.empty(3, device="cuda:0")]
                return make_fx(function)(*values)

        body = subgraph(lambda k, y: (k + 1, y * 2))
        assert cuda_graphs.launches_alone(subgraph(lambda k, y: (k < 3,)), body)
        assert not cuda_graphs.launches_alone(subgraph(lambda k, y: (y.sum() < 3,)), body)

    def test_a_move_from_the_host(self):
        assert self.involved(lambda k, y: (k + 1, y * k.to("cuda:0")))
        assert not self.involved(lambda k, y: (k + 1, y * k))  # passed as a number

    def test_operators_that_ask_the_device(self):
        aten, graph, mode = torch.ops.aten, fx.Graph(), FakeTensorMode()

        def value(dtype):
            node = graph.placeholder("value")
            with mode:
                node.meta["val"] = torch.empty(3, 3, dtype=dtype, device="cuda:0")
            return node

        y = value(torch.float32)
        for target, args, asks in [
            (aten.nonzero.default, (y,), True),
            (aten.linalg_inv_ex.default, (y,), True),
            (aten.index.Tensor, (y, [value(torch.bool)]), True),
            (aten.index.Tensor, (y, [value(torch.int64)]), False),
            (aten.tanh.default, (y,), False),
        ]:
            assert cuda_graphs._involves_host(graph.call_function(target, args)) == asks

    def test_operators_that_act_on_the_host_or_may(self):
        @torch.library.custom_op("cuda_graphs_test::unknown", mutates_args=())
        def unknown(x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        unknown.register_fake(torch.empty_like)
        assert self.involved(lambda k, y: (k + 1, unknown(y)))
        assert self.involved(lambda k, y: (torch.ops.rampde_fx.record_sweep(k, k, 3, "loop"), y))
        assert not self.involved(lambda k, y: (k + 1, torch.ops.rampde_fx.narrow(y, dtype=torch.float16)))

    def test_a_number_of_the_host_is_none(self):
        graph = fx.Graph()
        k = graph.placeholder("k")
        k.meta["val"] = torch.zeros((), dtype=torch.int64)
        read = graph.call_function(torch.ops.aten._local_scalar_dense.default, (k,))
        chosen = graph.call_function(operator.getitem, (k, 0))
        assert not any(map(cuda_graphs._involves_host, (k, read, chosen)))
        with FakeTensorMode():
            k.meta["val"] = torch.zeros((), dtype=torch.int64, device="cuda:0")
        assert cuda_graphs._involves_host(read)


def test_caches_tell_code_from_other_code():
    """What is replayed from what is not, and each way in which loops in C++ are written."""

    class Keyed:
        def __init__(self, key):
            self.key = key

        def uuid(self):
            return self.key

    written = [(replayed, code) for replayed in (False, True) for code in (None, Keyed("one"), Keyed("other"))]
    keys = {inductor._Lowering([lambda graph: None], None, *how).uuid() for how in written}
    assert keys == {None}  # a pass without a key is not cached
    assert len({inductor._Lowering([Keyed("key")], None, *how).uuid() for how in written}) == 6


def test_a_wrapper_in_cpp_has_no_graphs():
    options = {"cpp_wrapper": True, "triton.cudagraphs": True}
    model = rampde_fx.mixed_precision(Euler(), dtype=torch.float16)
    function = torch.compile(model, backend="rampde_fx", options=options, fullgraph=True)
    with pytest.raises(PolicyError, match="cpp_wrapper"):
        function(torch.randn(3, 5), torch.linspace(0, 1, 4))


@pytest.mark.inductor
@pytest.mark.slow
class TestInductor:
    @staticmethod
    def closure(monkeypatch):
        """Captures whose replay runs the generated code again: its C++ kernels cannot be recorded."""
        found = []

        def capture(run):
            results = run()
            found.append(run)

            def replay():
                for old, new in zip(results, run(), strict=True):
                    if isinstance(old, torch.Tensor) and old.ndim and old is not new:
                        old.copy_(new)

            return replay, results

        monkeypatch.setattr(cuda_graphs, "DEVICES", {"cpu"})
        monkeypatch.setattr(cuda_graphs, "capture", capture)
        return found

    def test_training(self, monkeypatch):
        found = self.closure(monkeypatch)
        model = Euler()
        plain = copy.deepcopy(model)
        marked = rampde_fx.mixed_precision(model, dtype=torch.float16)
        function = torch.compile(marked, backend="rampde_fx", mode="reduce-overhead", fullgraph=True)
        t = torch.linspace(0, 1, 5)
        for seed in range(4):
            y = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed))
            got, wanted = gradients(function, model, y, t), gradients(plain, plain, y, t)
            assert max(relative_errors(got, wanted)) < 4e-3  # a few unit roundoffs of float16
        assert len(found) == 2  # the forward and the reverse loop; the loop that repeats it reads the flag

    @pytest.mark.skipif(
        torch.__version__ < TorchVersion("2.13"), reason="Inductor leaves out the rounding that overflows"
    )
    def test_a_backward_that_is_repeated(self, monkeypatch):
        found = self.closure(monkeypatch)
        model = Steep(64)
        other = copy.deepcopy(model)
        marked = rampde_fx.mixed_precision(model, dtype=torch.float16)
        function = torch.compile(marked, backend="rampde_fx", mode="reduce-overhead", fullgraph=True)
        plain, t = compiled(other, torch.float16), torch.linspace(0, 1e-6, 4)
        rampde_fx.backward_counts(reset=True)
        for seed in range(3):
            y = 1e-3 * (1 + torch.rand(16, 64, generator=torch.Generator().manual_seed(seed)))
            got, wanted = gradients(function, model, y, t), gradients(plain, other, y, t)
            assert max(relative_errors(got, wanted)) < 2.5e-3
        (count,) = rampde_fx.backward_counts(reset=True).values()
        assert count.passes == count.repeated == 6
        assert len(found) == 3  # one of the reverse loop for each target, which is a number on the host here
