"""What inference engines can read: targets, the numbers that each holds exactly, and limits.

A plan is exported to a target, a form of files. An engine reads one target, and has limits of its
own: layers that it computes as one, and devices without a kernel. Needs no torch.
"""

from autoquant.engines.engine import ENGINES, Engine, engine, target
from autoquant.engines.programs import PROGRAMS, ProgramForm
from autoquant.engines.targets import TARGETS, Refusal, Scheme, Stored, Target
from autoquant.engines.values import ACTIVATIONS, Activations, Values, rounded_activation

__all__ = [
    "ACTIVATIONS",
    "ENGINES",
    "PROGRAMS",
    "TARGETS",
    "Activations",
    "Engine",
    "ProgramForm",
    "Refusal",
    "Scheme",
    "Stored",
    "Target",
    "Values",
    "engine",
    "rounded_activation",
    "target",
]
