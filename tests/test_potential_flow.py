"""The potential-flow example: the closed forms, its data and its metric, and a short training run."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import rampde_fx
from rampde_fx.ir import graphs, operator_table

for name in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(name)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
common = importlib.import_module("common")
mmd = importlib.import_module("mmd")
potential_flow = importlib.import_module("potential_flow")
tabular_data = importlib.import_module("tabular_data")
training_options = importlib.import_module("training_options")


def random_potential(dim: int, layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    potential = potential_flow.Potential(dim, 7, layers).double()
    for parameter in potential.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return potential


def options(*more: str) -> object:
    small = "--data breast_cancer --batch 16 --width 8 --steps 2 --iterations 6 --compiler aot_eager --device cpu"
    return potential_flow.parse_arguments([*small.split(), *more])


@pytest.fixture(scope="module")
def cancer():
    return potential_flow.Transport(options())


@pytest.mark.parametrize("layers", [1, 3])
def test_derivatives_of_the_potential(layers):
    potential = random_potential(5, layers)
    x, t = torch.randn(4, 5, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)

    def phi(x, t):
        return potential.value(t, x[None])[0]

    def over_points(function):
        return torch.vmap(function, (0, None))(x, t)

    gradient, by_time, trace = potential.derivatives(t, x)
    torch.testing.assert_close(gradient, over_points(torch.func.grad(phi)))
    torch.testing.assert_close(by_time, over_points(torch.func.grad(phi, argnums=1)))
    hessian = over_points(torch.func.hessian(phi))
    torch.testing.assert_close(trace, hessian.diagonal(dim1=1, dim2=2).sum(dim=1))


def test_velocity_and_integrands():
    flow = potential_flow.PotentialFlow(5, 7).double()
    flow.potential = random_potential(5, 1)
    x, t = torch.randn(4, 5, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    gradient, by_time, trace = flow.potential.derivatives(t, x)
    velocity, integrands = flow.velocity(t, x)
    torch.testing.assert_close(velocity, -gradient)
    cost = gradient.norm(dim=1) ** 2 / 2
    torch.testing.assert_close(integrands, torch.stack([-trace, cost, (by_time - cost).abs()], dim=1))


def test_log_determinant_is_that_of_the_map():
    flow = potential_flow.PotentialFlow(3, 7).double()
    flow.potential = random_potential(3, 1)
    x, t = torch.randn(6, 3, dtype=torch.float64), torch.linspace(0, 1, 33, dtype=torch.float64)
    jacobian = torch.vmap(torch.func.jacrev(lambda point: flow(point[None], t)[0][0]))(x)
    torch.testing.assert_close(flow(x, t)[1][:, 0], torch.linalg.slogdet(jacobian)[1], atol=1e-5, rtol=1e-5)
    back = potential_flow.draw(flow, flow(x, t)[0], t)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)


def test_loss_of_the_standing_flow_is_that_of_the_base():
    flow = potential_flow.PotentialFlow(3, 7)
    for parameter in flow.parameters():
        torch.nn.init.zeros_(parameter)
    points, t = torch.randn(11, 3), torch.linspace(0, 1, 3)
    likelihood, cost, residual = potential_flow.terms(flow, points, t)
    normal = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
    torch.testing.assert_close(likelihood, -normal.log_prob(points))
    assert cost.abs().max() == residual.abs().max() == 0
    whole = potential_flow.negative_log_likelihood(flow, points, t, batch=4)
    assert whole == pytest.approx(likelihood.mean().item(), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_squared_mmd_is_the_sum_over_pairs(shift):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 3, generator=generator, dtype=torch.float64).split([7, 9])
    y = y + shift
    widths = mmd.bandwidths(x)

    def kernel(a, b):
        return sum(torch.exp(-((a - b) ** 2).sum() / (2 * s * s)).item() for s in widths) / len(widths)

    def mean(pairs):
        values = [kernel(a, b) for a, b in pairs]
        return sum(values) / len(values)

    def others(a):
        return [(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]

    naive = mean(others(x)) + mean(others(y)) - 2 * mean([(a, b) for a in x for b in y])
    assert mmd.squared_mmd(x, y, widths) == pytest.approx(naive, abs=1e-12)


def test_squared_mmd_tells_shifted_samples_from_equal_ones():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 400, 3, generator=generator)
    widths = mmd.bandwidths(x)
    assert widths[2] == pytest.approx(torch.nn.functional.pdist(x).median().item(), rel=1e-5)
    # Under equality the standard deviation of the estimate is about E k^2 / n, 1e-3 here.
    assert abs(mmd.squared_mmd(x, y, widths)) < 5e-3
    assert mmd.squared_mmd(x, y + 0.5, widths) > 2e-2


@pytest.mark.parametrize(
    ("name", "dim", "sizes"), [("digits", 64, (1200, 300, 297)), ("breast_cancer", 30, (369, 100, 100))]
)
def test_tables_are_split_and_seeded(name, dim, sizes):
    table, again = tabular_data.load(name), tabular_data.load(name)
    assert (len(table.train), len(table.validation), len(table.held_out)) == sizes
    assert table.dim == dim == table.held_out.shape[1]
    assert torch.equal(table.held_out, again.held_out)
    assert torch.equal(table.train, again.train)
    first = table.sample(50, torch.Generator().manual_seed(1))
    assert torch.equal(first, table.sample(50, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, table.sample(50, torch.Generator().manual_seed(2)))
    many = table.sample(20_000, torch.Generator().manual_seed(3))
    assert many.mean(dim=0).abs().max() < 0.15
    assert (many.std(dim=0) - 1).abs().max() < 0.2
    torch.testing.assert_close(table.standardise(table.restore(first)), first, atol=1e-4, rtol=1e-4)


def test_no_digit_is_in_two_parts():
    table = tabular_data.digits()
    parts = [17 * table.restore(part) for part in (table.validation, table.held_out)] + [table.train]
    images = [{tuple(row) for row in part.add(1e-4).floor().tolist()} for part in parts]
    assert len(set.union(*images)) == sum(map(len, parts)) == 1797


def test_no_cancer_is_in_two_parts():
    table = tabular_data.breast_cancer()
    train = table.standardise(table.train)
    for part in (table.validation, table.held_out):
        # The same row would be as far as its noise, 0.05 sqrt(30) = 0.27.
        assert torch.cdist(part, train).min() > 0.5


def test_bsds300_needs_its_file(tmp_path):
    with pytest.raises(SystemExit, match="--file PATH"):
        tabular_data.load("bsds300")
    with pytest.raises(SystemExit, match=r"h5py|there is no"):
        tabular_data.load("bsds300", tmp_path / "none.hdf5")


def test_bsds300_is_read_from_its_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "some.hdf5"
    generator = torch.Generator().manual_seed(0)
    with h5py.File(path, "w") as file:
        for key, count in (("train", 200), ("validation", 30), ("test", 20)):
            file[key] = (3 + 2 * torch.randn(count, 63, generator=generator)).numpy()
    table = tabular_data.load("bsds300", path)
    assert (table.dim, len(table.train), len(table.validation), len(table.held_out)) == (63, 200, 30, 20)
    assert table.sample(5, generator).shape == (5, 63)
    assert table.own_unit() == pytest.approx(63 * torch.tensor(2.0).log().item(), rel=0.1)


def test_products_are_low_and_sums_wide(cancer):
    flow = rampde_fx.mixed_precision(cancer.module(), dtype=torch.float16)
    (points,) = cancer.sample(torch.Generator().manual_seed(0))
    (loop,) = rampde_fx.explain(flow, points, torch.linspace(0, 1, 4)).loops
    assert [carry.split(":")[0] for carry in loop.carries] == ["x", "integrals"]
    assert (loop.evaluations, loop.policy.velocity, loop.stored) == (4, torch.float16, ("x: float16[16, 30]",))
    calls = [node for node in loop.step.graph.nodes if node.op == "call_module"]
    assert len(calls) == 4
    for node in loop.step.graph.find_nodes(op="placeholder"):
        assert node.meta["val"].dtype is torch.float32
    products = [node for node in loop.step.velocity_0.graph.nodes if operator_table.is_product(node)]
    assert len(products) >= 7
    assert {node.meta["val"].dtype for node in products} == {torch.float16}
    # One product with the batch's Jacobians, no batch of products.
    assert not loop.step.velocity_0.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    for graph in (loop.step.graph, loop.adjoint.graph):
        sums = [node for node in graph.nodes if node.target is torch.ops.aten.add.Tensor]
        assert sums
        assert {node.meta["val"].dtype for node in sums if graphs.is_float(node)} == {torch.float32}


def trained(workload: object, model: object, module: torch.nn.Module, iterations: int) -> torch.Tensor:
    """The losses of a few iterations of Adam, (iterations,)."""
    optimizer, generator = workload.optimizer(module, 1e-2), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(iterations):
        loss = workload.loss(model, *workload.sample(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_trains_in_float16_as_in_float32(cancer):
    torch.manual_seed(0)
    plain = cancer.module()
    module = cancer.module()
    module.load_state_dict(plain.state_dict())
    reference = trained(cancer, plain, plain, iterations=8)
    model = common.compiled(module, training_options.POLICIES["float16"], "aot_eager")
    losses = trained(cancer, model, module, iterations=8)
    assert losses[-1] < 0.95 * losses[0]
    # A few unit roundoffs of float16, 4.9e-4.
    torch.testing.assert_close(losses, reference, rtol=2e-3, atol=0)
    held_out, expected = cancer.held_out(model), cancer.held_out(plain)
    assert held_out == pytest.approx(expected, rel=2e-3)


def test_results_and_pictures(cancer, tmp_path):
    torch.manual_seed(0)
    for workload in (cancer, potential_flow.Transport(options("--data", "digits"))):
        module = workload.module()
        with torch.no_grad():
            found = workload.held_out(module) | workload.held_out_plain(module)
            workload.draw(module, 0, tmp_path / f"{workload.name}.png")
        assert found.keys() == workload.metrics.keys()
        # Untrained, the flow is far from the data.
        assert found["mmd"] > 5
        assert found["loss_fine"] == pytest.approx(found["loss"], rel=1e-2)
        assert (tmp_path / f"{workload.name}.png").stat().st_size > 10_000


def test_notes_hold_the_normal_distribution_and_the_floor(cancer):
    _, normal, floor, unit = cancer.notes()
    assert abs(float(floor.split("1000 ")[1].rstrip("."))) < float(normal.split("1000 ")[1].rstrip("."))
    loss = float(normal.split("held-out loss ")[1].split()[0])
    points = cancer.table.sample(20_000, torch.Generator().manual_seed(9))
    centred = (cancer.table.held_out - points.mean(dim=0)).double()
    covariance = torch.cov(points.T).double()
    expected = 0.5 * (centred @ covariance.inverse() * centred).sum(dim=1).mean()
    expected += 0.5 * torch.logdet(2 * torch.pi * covariance)
    assert loss == pytest.approx(expected.item(), abs=0.2)
    assert f"{cancer.table.own_unit():.4f} nats" in unit
