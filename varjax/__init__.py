"""Verifiable Adaptive Routing: look up what a Mixture-of-Experts router would do, and what its experts would say.

The core, free of any model: settings (`VARConfig`), context keys, routing statistics, residual answers, the table, the
context cache, and the pure functions `plan` and `commit` around a forward pass. `VARModel` puts them around a model,
`Auditor` watches it.
"""

from varjax.audit import Auditor
from varjax.config import LayerPolicy, VARConfig
from varjax.drift import Calibration, DriftWarning
from varjax.model import VARModel, build_table
from varjax.routing import CACHED, FAST, LEARNED, Plan, Routing
from varjax.stats import RoutingStats
from varjax.step import Settings, VARState, commit, init, milliseconds, plan
from varjax.table import RouteTable

__all__ = [
    "CACHED",
    "FAST",
    "LEARNED",
    "Auditor",
    "Calibration",
    "DriftWarning",
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
    "init",
    "milliseconds",
    "plan",
]
