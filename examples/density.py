"""A continuous normalizing flow, trained in mixed precision by the rampde_fx backend.

A point z at data time 0 is carried to base time 1 by dz/dt = v(t, z), together with the divergence of v along its
path, by RK4. With a standard normal base the density is

    log p(z(0)) = log N(z(1); 0, I) + integral of tr(dv/dz) dt from 0 to 1,

and the flow is trained to maximise it. Integrated from 1 to 0, the same flow turns normal points into samples.
Source: Grathwohl et al., FFJORD, 2019, arXiv 1810.01367; here the divergence is exact.
"""

import argparse
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import density_data
import density_plots
import torch
from common import DTYPES, positive
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from tqdm import tqdm

import rampde_fx

MIB = 2**20


class Flow(nn.Module):
    """The flow of an MLP velocity with two hidden tanh layers, v = W3 tanh(W2 tanh(W1 z + b1(t)) + b2(t)) + b3.

    Args:
        dim: Dimension of z.
        width: Width of both hidden layers.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(dim, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, dim)
        # The time enters as a shift of the biases of the hidden layers.
        self.first_shift = nn.Parameter(torch.randn(width))
        self.second_shift = nn.Parameter(torch.randn(width))
        # v = 0: training starts at the identity.
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def velocity(self, t: Tensor, y: Tensor) -> Tensor:
        """The right-hand side: velocity and divergence.

        Args:
            t: Time, 0-d.
            y: State, (batch, dim + 1): z and the divergence accumulated so far, on which nothing depends.

        Returns:
            (batch, dim + 1): dz/dt and tr(dv/dz).
        """
        z = y[:, :-1]
        h1 = torch.tanh(linear(z, self.first.weight, self.first.bias + t * self.first_shift))
        h2 = torch.tanh(linear(h1, self.second.weight, self.second.bias + t * self.second_shift))
        # tr(W3 D2 W2 D1 W1) = d2^T (W2 * (W1 W3)^T) d1 with d = 1 - h^2 the diagonals of D: one matmul, no VJP.
        middle = self.second.weight * (self.first.weight @ self.last.weight).T
        trace = (linear(1 - h1 * h1, middle) * (1 - h2 * h2)).sum(dim=1, keepdim=True)
        return torch.cat([self.last(h2), trace], dim=1)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        """Integrates y (batch, dim + 1) over the time grid t (steps + 1,), forward or backward in time, by RK4."""
        for t_i, dt in rampde_fx.steps(t):
            k1 = self.velocity(t_i, y)
            k2 = self.velocity(t_i + dt / 2, y + dt / 2 * k1)
            k3 = self.velocity(t_i + dt / 2, y + dt / 2 * k2)
            k4 = self.velocity(t_i + dt, y + dt * k3)
            y = y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y


# A Flow, compiled or not, called as integrate(y, t).
Integrate = Callable[[Tensor, Tensor], Tensor]


def log_density(integrate: Integrate, points: Tensor, t: Tensor) -> Tensor:
    """Log-density in nats, (batch,), at points (batch, dim), with t (steps + 1,) from data time to base time."""
    y = integrate(pad(points, (0, 1)), t)
    z, divergence = y[:, :-1], y[:, -1]
    return divergence - 0.5 * (z * z).sum(dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def held_out_loss(integrate: Integrate, points: Tensor, t: Tensor, batch: int) -> float:
    """Mean negative log-density of points (count, dim), in nats.

    The chunks have the training batch size, the last one filled up with points from the start, and gradients stay
    enabled: so the training graph is used again and nothing more is compiled.
    """
    total = 0.0
    for start in range(0, len(points), batch):
        chunk = torch.arange(start, start + batch, device=points.device)
        nats = log_density(integrate, points[chunk % len(points)], t).detach()
        total -= nats[chunk < len(points)].sum().item()
    return total / len(points)


@torch.no_grad()
def draw(flow: Flow, base: Tensor, t: Tensor) -> Tensor:
    """Carries base points (count, dim) back along t (steps + 1,) to samples (count, dim)."""
    return flow(pad(base, (0, 1)), t.flip(0))[:, :-1]


@dataclass(frozen=True)
class Settings:
    """All that decides a trajectory. A checkpoint is resumed under equal settings only."""

    data: str
    dtype: str
    steps: int
    iterations: int
    batch: int
    width: int
    lr: float
    seed: int
    device: str
    compiler: str

    def checkpoint(self, out: Path) -> Path:
        """The file of the checkpoint in the folder ``out``."""
        return out / f"{self.data}-{self.dtype}.pt"

    def time_grid(self, refinement: int = 1) -> Tensor:
        """From data time 0 to base time 1, (refinement * steps + 1,)."""
        return torch.linspace(0, 1, refinement * self.steps + 1, device=self.device)

    def learning_rate(self, iteration: int) -> float:
        """Cosine decay from lr to zero."""
        return 0.5 * self.lr * (1 + math.cos(math.pi * iteration / self.iterations))


@dataclass
class History:
    """What a run has recorded.

    Attributes:
        losses: Training loss of each iteration, in nats.
        seconds: Duration of each iteration but the first after a start or a resume.
        first_seconds: Duration of those first iterations, which compile, in total.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0


def save_checkpoint(
    path: Path,
    settings: Settings,
    flow: Flow,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    history: History,
) -> None:
    """Writes all that the next iteration depends on; the number of the iteration is the length of the losses."""
    state = {
        "settings": asdict(settings),
        "flow": flow.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "history": asdict(history),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)  # an interrupted write leaves the previous checkpoint whole


def load_checkpoint(
    path: Path, settings: Settings, flow: Flow, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> History:
    """Restores flow, optimizer and generator in place.

    Returns:
        The history so far.

    Raises:
        SystemExit: if there is no checkpoint, or it was written under other settings.
    """
    if not path.exists():
        raise SystemExit(f"--resume: there is no checkpoint {path}; start without --resume")
    state = torch.load(path, map_location=settings.device, weights_only=True)
    asked = asdict(settings)
    written = state["settings"]
    differing = [
        f"--{name} {written.get(name)} (now {asked[name]})" for name in asked if written.get(name) != asked[name]
    ]
    if differing:
        raise SystemExit(
            f"--resume: {path} was written with {', '.join(differing)}; "
            "give the same settings, or start without --resume"
        )
    flow.load_state_dict(state["flow"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"].cpu())
    return History(**state["history"])


def train(
    settings: Settings,
    data: density_data.Planar | density_data.Digits,
    flow: Flow,
    integrate: Integrate,
    checkpoint: Path,
    resume: bool,
    save_every: int = 100,
) -> tuple[History, bool]:
    """Trains a flow with Adam, and writes checkpoints regularly, at the end and at Ctrl-C.

    Args:
        settings: The settings of the run.
        data: Where the batches come from.
        flow: The module whose parameters are trained.
        integrate: The same module, compiled or not.
        checkpoint: File to write, and to start from with resume.
        resume: Whether to continue from the checkpoint.
        save_every: Iterations between checkpoints.

    Returns:
        The history, and whether the run was interrupted.
    """
    optimizer = torch.optim.Adam(flow.parameters(), lr=settings.lr)
    # On the CPU whatever the device, so that all runs of one seed see the same batches.
    generator = torch.Generator().manual_seed(settings.seed)
    history = load_checkpoint(checkpoint, settings, flow, optimizer, generator) if resume else History()
    t = settings.time_grid()
    interrupted = False

    def finish_iteration(signum: int, frame: object) -> None:
        # The state between two iterations is the one to resume from. A second Ctrl-C stops at once.
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, finish_iteration)
    started = done = len(history.losses)
    progress = tqdm(
        total=settings.iterations, initial=done, desc=f"{settings.data} {settings.dtype}", unit="it", disable=None
    )
    try:
        while done < settings.iterations and not interrupted:
            begin = time.perf_counter()
            optimizer.param_groups[0]["lr"] = settings.learning_rate(done)
            points = data.sample(settings.batch, generator).to(settings.device)
            # float16 needs no GradScaler: the generated adjoint scales its cotangents itself.
            loss = -log_density(integrate, points, t).mean()
            optimizer.zero_grad()
            loss.backward()
            value = loss.item()
            if not math.isfinite(value):
                raise SystemExit(f"the loss is {value} at iteration {done}; lower --lr or raise --steps")
            optimizer.step()
            elapsed = time.perf_counter() - begin
            if done == started:
                history.first_seconds += elapsed
            else:
                history.seconds.append(elapsed)
            history.losses.append(value)
            done += 1
            progress.update()
            progress.set_postfix(nats=f"{statistics.fmean(history.losses[-20:]):.3f}", refresh=False)
            if interrupted or done == settings.iterations or done % save_every == 0:
                save_checkpoint(checkpoint, settings, flow, optimizer, generator, history)
    finally:
        progress.close()
        signal.signal(signal.SIGINT, previous)
    return history, done < settings.iterations


@dataclass
class Result:
    """A finished run.

    Attributes:
        history: What training has recorded.
        held_out: Held-out loss in nats, computed as in training.
        held_out_fine: The same in fp32 with four times the steps. Where it is much larger, the flow profits from the
            discretisation error; more steps or a lower learning rate mend that.
        stored: Bytes that the integration loop stores for the backward.
        stored_autograd: Bytes that plain autograd would store.
        backward: Backward passes of this process, and how many overflowed and were repeated; all zero where the adjoint
            is not scaled.
    """

    history: History
    held_out: float
    held_out_fine: float
    stored: int
    stored_autograd: int
    backward: rampde_fx.BackwardCount


def run(settings: Settings, out: Path, resume: bool) -> Result | None:
    """Trains one flow, or resumes its training, and draws its pictures into ``out``; None where interrupted."""
    data = density_data.load(settings.data)
    torch.manual_seed(settings.seed)
    flow = Flow(data.dim, settings.width).to(settings.device)
    flow = rampde_fx.mixed_precision(flow, dtype=DTYPES[settings.dtype])
    model = torch.compile(flow, backend="rampde_fx", options={"compiler": settings.compiler}, fullgraph=True)
    checkpoint = settings.checkpoint(out)
    rampde_fx.backward_counts(reset=True)
    history, interrupted = train(settings, data, flow, model, checkpoint, resume)
    if interrupted:
        print(f"interrupted after {len(history.losses)} iterations; continue with --resume from {checkpoint}")
        return None

    (backward,) = rampde_fx.backward_counts().values() or [rampde_fx.BackwardCount()]  # one loop; none unscaled

    t = settings.time_grid()
    held_out_points = data.held_out.to(settings.device)
    held_out = held_out_loss(model, held_out_points, t, settings.batch)
    # Uncompiled, the module is plain fp32 code for any batch size and time grid; it also draws the pictures.
    with torch.no_grad():
        held_out_fine = held_out_loss(flow, held_out_points, settings.time_grid(4), settings.batch)
    state = torch.zeros(settings.batch, data.dim + 1, device=settings.device)
    loop = rampde_fx.explain(model, state, t).loops[0]

    count = density_plots.PLANAR_POINTS if settings.data in density_data.PLANAR else density_plots.DIGITS_SHOWN
    generator = torch.Generator().manual_seed(settings.seed + 1)
    real = data.sample(count, generator)
    samples = draw(flow, torch.randn(count, data.dim, generator=generator).to(settings.device), t).cpu()
    picture = checkpoint.with_suffix(".png")
    if isinstance(data, density_data.Digits):
        density_plots.digits(data.to_images(real), data.to_images(samples), picture)
    else:
        grid = density_plots.grid().to(settings.device)
        with torch.no_grad():
            log_p = torch.cat([log_density(flow, chunk, t) for chunk in grid.split(8192)])
        density_plots.planar(real, samples, log_p.exp().cpu(), picture)
    print(f"{checkpoint.stem}: held-out loss {held_out:.4f} nats, picture {picture}")
    return Result(history, held_out, held_out_fine, loop.stored_bytes, loop.stored_bytes_autograd, backward)


def print_results(results: dict[str, Result]) -> None:
    """Prints the results, by dtype, side by side."""

    def median_ms(result: Result) -> float:
        return 1e3 * statistics.median(result.history.seconds or [math.nan])

    rows: list[tuple[str, Callable[[Result], float], str]] = [
        ("held-out loss (nats)", lambda r: r.held_out, ".4f"),
        ("  in fp32, 4 x the steps", lambda r: r.held_out_fine, ".4f"),
        ("training loss, last 50 (nats)", lambda r: statistics.fmean(r.history.losses[-50:]), ".4f"),
        ("first iteration, compiles (s)", lambda r: r.history.first_seconds, ".1f"),
        ("other iterations, median (ms)", median_ms, ".1f"),
        ("stored for the backward (MiB)", lambda r: r.stored / MIB, ".3f"),
        ("  by plain autograd (MiB)", lambda r: r.stored_autograd / MIB, ".3f"),
        ("backward passes counted", lambda r: r.backward.passes, "d"),
        ("  repeated (%)", lambda r: 100 * r.backward.repeated / max(r.backward.passes, 1), ".1f"),
    ]
    print(f"\n{'':32}" + "".join(f"{dtype:>12}" for dtype in results))
    for label, value, form in rows:
        print(f"{label:32}" + "".join(f"{value(result):>12{form}}" for result in results.values()))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""

    def device(text: str) -> str:
        try:
            torch.empty(0, device=text)
        except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
            raise argparse.ArgumentTypeError(f"{text!r} is not usable: {error}".splitlines()[0]) from None
        return text

    parser = argparse.ArgumentParser(
        description="Train a continuous normalizing flow in mixed precision: RK4, exact divergence, Adam.",
        epilog="Writes DATA-DTYPE.pt (checkpoint), DATA-DTYPE.png (samples and density) and DATA-loss.png to --out. "
        "Ctrl-C finishes the iteration and writes the checkpoint. The defaults suit 8gaussians and digits; 2spirals "
        "and checkerboard need about --iterations 1500 --lr 0.005.",
    )
    parser.add_argument("--data", choices=density_data.NAMES, default="8gaussians", help="default %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="dtype of the velocity evaluations, default %(default)s"
    )
    parser.add_argument(
        "--compare", action="store_true", help="train in float32 first, with the same seed and batches, and compare"
    )
    for option, default, what in (
        ("--steps", 8, "RK4 steps"),
        ("--iterations", 250, "training iterations"),
        ("--batch", 256, "batch size"),
        ("--width", 64, "width of both hidden layers"),
    ):
        parser.add_argument(option, metavar="N", type=positive, default=default, help=f"{what}, default %(default)s")
    parser.add_argument(
        "--lr", metavar="RATE", type=float, default=2e-2, help="learning rate, decays by a cosine, default %(default)s"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of parameters and batches, default %(default)s"
    )
    parser.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...; default %(default)s here",
    )
    parser.add_argument(
        "--compiler",
        choices=["inductor", "aot_eager"],
        default="inductor",
        help="what compiles the rewritten graph, default %(default)s",
    )
    out = Path("examples/out/density")
    parser.add_argument("--out", metavar="DIR", type=Path, default=out, help="output folder, default %(default)s")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    parsed = parser.parse_args(arguments)
    if parsed.compare and parsed.dtype == "float32":
        parser.error("--compare sets another dtype beside float32: give --dtype bfloat16 or float16")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Runs the example and returns its exit status."""
    options = vars(parse_arguments(arguments))
    compare, out, resume = options.pop("compare"), options.pop("out"), options.pop("resume")
    settings = Settings(**options)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    for dtype in ["float32", settings.dtype] if compare else [settings.dtype]:
        one = replace(settings, dtype=dtype)
        # The second run of a comparison may not have begun when the first was interrupted.
        result = run(one, out, resume and (not results or one.checkpoint(out).exists()))
        if result is None:
            return 130  # as after SIGINT
        results[dtype] = result
    density_plots.losses({dtype: r.history.losses for dtype, r in results.items()}, out / f"{settings.data}-loss.png")
    print_results(results)
    if compare:
        reference, low = results["float32"].held_out, results[settings.dtype].held_out
        print(f"\nrelative difference of the held-out losses: {abs(low - reference) / abs(reference):.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
