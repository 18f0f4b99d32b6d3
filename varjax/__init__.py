"""Verifiable Adaptive Routing: look up what a Mixture-of-Experts router would do, and what its experts would say.

The core knows no particular model: settings (`VARConfig`), context keys (`count_contexts`), routing statistics and
answers (the experts' mean outputs at each key), the table, the context cache, and the pure functions `plan`, `resolve`
and `commit` around a forward pass. `VARModel` puts them around a model, `Auditor` watches it.
"""

from varjax.answers import Answers
from varjax.audit import Auditor
from varjax.config import LayerPolicy, VARConfig
from varjax.drift import Calibration, DriftWarning
from varjax.errors import InputError
from varjax.keys import count_contexts
from varjax.model import Generation, VARModel, load_table
from varjax.routing import CACHED, FAST, LEARNED, Plan, Routing, resolve
from varjax.stats import RoutingStats
from varjax.step import Settings, VARState, commit, init, plan, timestamp
from varjax.table import RouteTable, build_table

__all__ = [
    "CACHED",
    "FAST",
    "LEARNED",
    "Answers",
    "Auditor",
    "Calibration",
    "DriftWarning",
    "Generation",
    "InputError",
    "LayerPolicy",
    "Plan",
    "RouteTable",
    "Routing",
    "RoutingStats",
    "Settings",
    "VARConfig",
    "VARModel",
    "VARState",
    "build_table",
    "commit",
    "count_contexts",
    "init",
    "load_table",
    "plan",
    "resolve",
    "timestamp",
]
