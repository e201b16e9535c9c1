"""Mixed-precision training of neural ODEs as a compiler pass (arXiv 2510.23498)."""

from rampde_fx import errors
from rampde_fx.check_table import CheckResult, CheckRow
from rampde_fx.checking import check
from rampde_fx.counts import (
    BackwardCount,
    EvaluationCount,
    StateCount,
    backward_counts,
    evaluation_counts,
    state_counts,
)
from rampde_fx.integrate import odeint
from rampde_fx.marking import mixed_precision, policy_of, steps
from rampde_fx.monitoring import AdjointRecord, Monitor, monitor
from rampde_fx.policy import AdjointScaling, PrecisionPolicy
from rampde_fx.report import explain
from rampde_fx.tableau import METHODS, ButcherTableau

__all__ = [
    "METHODS",
    "AdjointRecord",
    "AdjointScaling",
    "BackwardCount",
    "ButcherTableau",
    "CheckResult",
    "CheckRow",
    "EvaluationCount",
    "Monitor",
    "PrecisionPolicy",
    "StateCount",
    "backward_counts",
    "check",
    "errors",
    "evaluation_counts",
    "explain",
    "mixed_precision",
    "monitor",
    "odeint",
    "policy_of",
    "state_counts",
    "steps",
]
__version__ = "0.1.0"
