"""Mixed-precision training of neural ODEs as a compiler pass (arXiv 2510.23498)."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rampde_fx import errors
from rampde_fx.frontend.marking import mixed_precision, policy_of, steps
from rampde_fx.policy import AdjointScaling, PrecisionPolicy
from rampde_fx.proof.check_table import CheckResult, CheckRow
from rampde_fx.runtime.adjoint_record import AdjointRecord
from rampde_fx.runtime.counts import (
    BackwardCount,
    EvaluationCount,
    StateCount,
    backward_counts,
    evaluation_counts,
    state_counts,
)
from rampde_fx.runtime.monitoring import Monitor, monitor
from rampde_fx.schedules import MemoryBudget
from rampde_fx.solvers.integrate import odeint
from rampde_fx.solvers.statistics import SolveStatistics
from rampde_fx.solvers.tableau import METHODS, ButcherTableau

# What compiles needs Dynamo and Inductor, which take twice as long to import as torch: when it is asked for.
_LATER = {
    "check": "proof.checking",
    "explain": "report.explain",
    "export": "shipping",
    "LoopReport": "report.loop_report",
    "Report": "report.explain",
}
if TYPE_CHECKING:
    from rampde_fx.proof.checking import check
    from rampde_fx.report.explain import Report, explain
    from rampde_fx.report.loop_report import LoopReport
    from rampde_fx.shipping import export
else:

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return getattr(import_module(f"rampde_fx.{_LATER[name]}"), name)
        if name == "backend":
            return import_module("rampde_fx.backend")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """The package, which may be given to torch.compile as its backend, as its name may be."""

    takes_repeats = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("rampde_fx.backend").rampde_fx(*args, **kwargs)


sys.modules[__name__].__class__ = _Package

__all__ = [
    "METHODS",
    "AdjointRecord",
    "AdjointScaling",
    "BackwardCount",
    "ButcherTableau",
    "CheckResult",
    "CheckRow",
    "EvaluationCount",
    "LoopReport",
    "MemoryBudget",
    "Monitor",
    "PrecisionPolicy",
    "Report",
    "SolveStatistics",
    "StateCount",
    "backward_counts",
    "check",
    "errors",
    "evaluation_counts",
    "explain",
    "export",
    "mixed_precision",
    "monitor",
    "odeint",
    "policy_of",
    "state_counts",
    "steps",
]
__version__ = "0.1.0"
