"""The interface of torchdiffeq 0.2.5: its names, arguments, defaults, method names and meanings.

`import rampde_fx.torchdiffeq as torchdiffeq` is the one line that changes. Uncompiled, what is solved is solved as
there, by code of this package. In a model that is compiled for the rampde_fx backend the steps are rewritten as those
of rampde_fx.odeint are; what the backend cannot rewrite is refused by its name, or without fullgraph=True runs
uncompiled, with an errors.FullPrecisionWarning where mixed precision was asked for.
"""

from rampde_fx.torchdiffeq.events import odeint_event
from rampde_fx.torchdiffeq.interface import odeint, odeint_adjoint, odeint_dense

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
__version__ = "0.2.5"
