"""Serving: answer many users inside their SLO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hasten.budget import SLO
from hasten.serve import policy, workload
from hasten.serve.balance import LeastTokens, RoundRobin
from hasten.serve.batch import Chunk, ChunkKind, Observation, StepPlan
from hasten.serve.capacity import Capacity, attainment
from hasten.serve.cost import BudgetChoice, IterationCost
from hasten.serve.metrics import EffectiveThroughput, RequestRecord, ServingMetrics, summarise
from hasten.serve.policy import Policy
from hasten.serve.request import FinishReason, Sequence, Status
from hasten.serve.simulate import SimulationReport, Simulator
from hasten.serve.workload import RequestSpec, Workload

if TYPE_CHECKING:
    from hasten.serve import bench
    from hasten.serve.engine import Engine
    from hasten.serve.local import Pipeline, pipeline
    from hasten.serve.remote import Client, client
    from hasten.serve.server import ServerConfig, ServerHandle, start
    from hasten.serve.worker import WorkerConfig

__all__ = [
    "SLO",
    "BudgetChoice",
    "Capacity",
    "Chunk",
    "ChunkKind",
    "Client",
    "EffectiveThroughput",
    "Engine",
    "FinishReason",
    "IterationCost",
    "LeastTokens",
    "Observation",
    "Pipeline",
    "Policy",
    "RequestRecord",
    "RequestSpec",
    "RoundRobin",
    "Sequence",
    "ServerConfig",
    "ServerHandle",
    "ServingMetrics",
    "SimulationReport",
    "Simulator",
    "Status",
    "StepPlan",
    "WorkerConfig",
    "Workload",
    "attainment",
    "bench",
    "client",
    "pipeline",
    "policy",
    "start",
    "summarise",
    "workload",
]

_LAZY = {
    "Client": "remote",
    "Engine": "engine",
    "Pipeline": "local",
    "ServerConfig": "server",
    "ServerHandle": "server",
    "WorkerConfig": "worker",
    "client": "remote",
    "pipeline": "local",
    "start": "server",
}
"""Names whose modules load torch or a web server; they are imported when first asked for."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "bench":
        return import_module("hasten.serve.bench")
    if name in _LAZY:
        return getattr(import_module(f"hasten.serve.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'hasten.serve' has no attribute {name!r}")
