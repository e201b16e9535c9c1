"""Rewritten models among the other tools of a training loop: each agrees with eager, or with the plain run."""

import copy
import itertools
import pickle
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rampde_fx
from rampde_fx import errors
from tests.comparison import compiled, gradients, relative_errors
from tests.models import Euler, Flow, Midpoint
from tests.processes import run_in_processes
from tests.test_storage import saved_bytes

# Drawn when the module is imported, before the seed of a test: from a generator of its own.
Y = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
T = torch.linspace(0, 1, 4)
FP16 = 2.5e-3


def pair(form=Midpoint, dtype=torch.float16):
    """A compiled model, the model in it, and a copy that stays eager."""
    model = form()
    return compiled(model, dtype), model, copy.deepcopy(model)


def of(model):
    return [p.grad for p in model.parameters()]


def test_grad_scaler_steps_and_skips():
    function, model, plain = pair()
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    for run, owner, scaler in zip((function, plain), (model, plain), scalers, strict=True):
        optimizer = torch.optim.SGD(owner.parameters(), lr=0.1)
        scaler.scale(run(Y, T).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**10
    assert max(relative_errors(list(model.parameters()), list(plain.parameters()))) < FP16
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scalers[0].scale(function(Y, T).square().mean() * 1e38).backward()
    scalers[0].step(optimizer)
    scalers[0].update()
    assert scalers[0].get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_clipped_gradients():
    function, model, plain = pair()
    norms = []
    for run, owner in ((function, model), (plain, plain)):
        run(Y, T).square().sum().backward()
        norms.append(nn.utils.clip_grad_norm_(owner.parameters(), 0.1))
    assert abs(norms[0] / norms[1] - 1) < FP16
    assert abs(torch.cat([g.flatten() for g in of(model)]).norm() - 0.1) < 1e-6
    assert max(relative_errors(of(model), of(plain))) < FP16


def test_accumulated_gradients_of_micro_batches():
    function, model, plain = pair()
    for part in Y.chunk(2):
        (function(part, T).square().mean() / 2).backward()
    plain(Y, T).square().mean().backward()
    assert max(relative_errors(of(model), of(plain))) < FP16
    whole = [g.clone() for g in of(model)]
    model.zero_grad()
    function(Y, T).square().mean().backward()
    assert max(relative_errors(whole, of(model))) < FP16


def test_checkpoint_round_a_compiled_model():
    function, model, plain = pair()

    def checkpointed(y, t):
        return checkpoint(function, y, t, use_reentrant=False)

    got = gradients(checkpointed, model, Y, T)
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(function, model, Y, T), strict=True))
    assert max(relative_errors(got, gradients(plain, plain, Y, T))) < FP16


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.flow, self.head = nn.Linear(16, 16), Euler(dim=16, width=32), nn.Linear(16, 3)

    def forward(self, y, t):
        y = torch.tanh(self.stem(y))
        return self.head(checkpoint(self.flow, y, t, use_reentrant=False) if self.checkpointed else self.flow(y, t))


def test_checkpoint_inside_a_compiled_model():
    """The numbers are those without a checkpoint, and no state of the loop is saved."""
    y, t = torch.randn(64, 16), torch.linspace(0, 1, 5)
    plain, found, saved = None, {}, {}
    for wanted in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Checkpointed()
        model.checkpointed = wanted
        plain = copy.deepcopy(model)
        function = compiled(model, torch.float16)
        found[wanted] = gradients(function, model, y, t)
        saved[wanted] = saved_bytes(function, y.clone().requires_grad_(), t)
        assert max(relative_errors(found[wanted], gradients(plain, plain, y, t))) < FP16
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))
    assert saved[False] - saved[True] >= 4 * 64 * 16 * 2


class UnderAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.flow, self.head = nn.Linear(5, 5), Midpoint(), nn.Linear(5, 2)

    def forward(self, y, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.stem(y)
        y = self.flow(y.float(), t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(y)


def test_autocast_round_the_layers_before_and_behind_the_loop():
    function, model, plain = pair(UnderAutocast, torch.float32)
    assert function(Y, T).dtype == torch.bfloat16
    assert max(relative_errors(gradients(function, model, Y, T), gradients(plain, plain, Y, T))) < 1e-6
    torch._dynamo.reset()
    function, model, plain = pair(UnderAutocast)
    assert max(relative_errors(gradients(function, model, Y, T), gradients(plain, plain, Y, T))) < 2e-2


class Tied(Flow):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(t_i, y)
        return torch.sin(y @ self.velocity.linear[-1].weight)


def test_parameter_shared_by_loop_and_head():
    function, model, plain = pair(Tied)
    assert max(relative_errors(gradients(function, model, Y, T), gradients(plain, plain, Y, T))) < FP16


def test_second_backward_and_untouched_gradient():
    function, model, plain = pair()
    y = Y.clone().requires_grad_()
    out, given = function(y, T), torch.randn(8, 5)
    kept = given.clone()
    out.backward(gradient=given, retain_graph=True)
    first = [y.grad.clone(), *(g.clone() for g in of(model))]
    y.grad = None
    model.zero_grad()
    out.backward(gradient=given)
    assert torch.equal(given, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, [y.grad, *of(model)], strict=True))
    plain(Y, T).backward(gradient=given)
    assert max(relative_errors(of(model), of(plain))) < FP16


def test_sibling_branches_read_the_same_gradient():
    function, model, plain = pair()
    found = []
    for run in (function, plain):
        y, z = Y.clone().requires_grad_(), Y.clone().requires_grad_()
        (run(y, T) + z + run(z, T)).sum().backward()
        found.append([y.grad, z.grad])
    assert max(relative_errors(*found)) < FP16
    assert max(relative_errors(of(model), of(plain))) < FP16


def test_functional_call():
    function, _, plain = pair()
    params = {f"_orig_mod.{name}": 1.5 * p.detach() for name, p in plain.named_parameters()}
    got = torch.func.functional_call(function, params, (Y, T))
    wanted = torch.func.functional_call(plain, {name: 1.5 * p for name, p in plain.named_parameters()}, (Y, T))
    assert max(relative_errors([got], [wanted])) < FP16
    assert (got - plain(Y, T)).norm() > 0.1 * wanted.norm()


def test_state_dict_round_trip():
    function, model, plain = pair()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name.removeprefix("_orig_mod.") for name in function.state_dict()] == list(plain.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    other = Midpoint()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(Y, T), model(Y, T))
    assert max(relative_errors([function(Y, T)], [other(Y, T)])) < FP16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_of_a_compiled_module(copied):
    function, model, _ = pair()
    wanted = gradients(function, model, Y, T)
    twin = copied(model)
    again = torch.compile(twin, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(again, twin, Y, T), wanted, strict=True))
    assert "float16" in str(rampde_fx.explain(twin, Y, T))


def train(function, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        function(Y, T).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


BREAK = threading.Barrier(2)


@torch.compiler.disable
def meet():
    BREAK.wait(60)


class Meeting(Euler):
    """Both threads are inside their marked targets before either compiles its loop."""

    def forward(self, y, t):
        if self.threaded:
            meet()
        return super().forward(y, t)


def test_threads_with_policies_of_their_own():
    models, wanted, found = {}, {}, {}
    for threaded in (False, True):
        torch._dynamo.reset()
        for seed, dtype in enumerate((torch.float16, torch.bfloat16)):
            torch.manual_seed(seed)
            model = Meeting()
            model.threaded = threaded
            marked = rampde_fx.mixed_precision(model, dtype=dtype)
            models[dtype] = torch.compile(marked, backend="rampde_fx", options={"compiler": "aot_eager"}), model
            if not threaded:
                wanted[dtype] = train(*models[dtype])

    def work(dtype):
        found[dtype] = train(*models[dtype])

    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for dtype, parameters in wanted.items():
        assert all(torch.equal(a, b) for a, b in zip(parameters, found[dtype], strict=True))


def test_more_marked_models_than_the_recompile_limit():
    """The limit holds for each marked model by itself: every one of them is rewritten."""
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(4):

            class Shifted(Euler):
                def forward(self, y, t, i=i):
                    return i + super().forward(y, t)

            function, _, plain = pair(Shifted)
            assert max(relative_errors([function(Y, T[:2])], [plain(Y, T[:2])])) < FP16


def test_a_loop_beyond_the_recompile_limit_is_said():
    function = torch.compile(
        rampde_fx.mixed_precision(Euler(), dtype=torch.float16), backend="rampde_fx", options={"compiler": "aot_eager"}
    )
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for steps in (1, 2):
            function(Y, T[: steps + 1])
    assert any("recompile_limit" in str(warning.message) for warning in caught)


class Distributed(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.stem, self.flow, self.head = nn.Linear(5, 5), flow(), nn.Linear(5, 2)

    def forward(self, y, t):
        return self.head(self.flow(torch.tanh(self.stem(y)), t))


class SolvedMidpoint(Flow):
    def forward(self, y, t):
        return rampde_fx.odeint(self.velocity, y, t, method="midpoint")[-1]


class SolvedAdaptively(Flow):
    def forward(self, y, t):
        return rampde_fx.odeint(self.velocity, y, t[[0, -1]], method="bosh3", rtol=1e-2, atol=1e-3)[-1]


FLOWS = {"steps": Midpoint, "odeint": SolvedMidpoint, "adaptive": SolvedAdaptively}
ORDERS = ("compiled inside", "compiled outside")
# Bytes of the first bucket: torch's own, in which all of a small model lies, and one that every parameter exceeds.
BUCKETS = {"one bucket": dist._DEFAULT_FIRST_BUCKET_BYTES, "many buckets": 1}


def seeded(flow):
    torch.manual_seed(0)
    return Distributed(FLOWS[flow]), torch.randn(8, 5)


def train_distributed(function, model, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        function(y, T).square().mean().backward()
        found += [g.clone() for g in of(model)]
        optimizer.step()
    return [*found, *(p.detach() for p in model.parameters())]


def distributed(model, order, **buckets):
    if order == "compiled inside":
        return DistributedDataParallel(compiled(model, torch.float16), **buckets)
    wrapped = DistributedDataParallel(rampde_fx.mixed_precision(model, dtype=torch.float16), **buckets)
    return torch.compile(wrapped, backend="rampde_fx", options={"compiler": "aot_eager"})


# By the number of processes: the flow, which of the two wraps the other, and the buckets.
RUNS = {
    1: [("adaptive", order, "many buckets") for order in ORDERS],
    2: [*itertools.product(("steps",), ORDERS, BUCKETS), *(("odeint", order, "many buckets") for order in ORDERS)],
}


def one_rank(rank, folder, world_size):
    warnings.simplefilter("error", errors.FullPrecisionWarning)
    for flow, order, name in RUNS[world_size]:
        torch._dynamo.reset()
        dist._DEFAULT_FIRST_BUCKET_BYTES = BUCKETS[name]
        model, y = seeded(flow)
        function = distributed(model, order, **({} if name == "one bucket" else {"bucket_cap_mb": 1e-5}))
        found = train_distributed(function, model, y.chunk(world_size)[rank])
        torch.save(found, f"{folder}/{flow} {order} {name} {rank}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_distributed_data_parallel(tmp_path, world_size):
    """The processes do what one does on the whole batch, in mixed precision, and stay bitwise equal."""
    run_in_processes(one_rank, tmp_path, world_size)
    wanted, wide = {}, {}
    for flow in {flow for flow, *_ in RUNS[world_size]}:
        torch._dynamo.reset()
        model, y = seeded(flow)
        plain = copy.deepcopy(model)
        wanted[flow] = train_distributed(compiled(model, torch.float16), model, y)
        wide[flow] = train_distributed(plain, plain, y)
    for flow, order, name in RUNS[world_size]:
        found = [torch.load(tmp_path / f"{flow} {order} {name} {rank}") for rank in range(world_size)]
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True))
        assert max(relative_errors(found[0], wanted[flow])) < FP16
        assert max(relative_errors(found[0], wide[flow])) > 1e-5, "no mixed precision"
