"""Serving: answer many users inside their SLO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hasten.budget import SLO

if TYPE_CHECKING:
    from hasten.serve import bench, policy, workload
    from hasten.serve.balance import LeastTokens, RoundRobin
    from hasten.serve.batch import Chunk, ChunkKind, Observation, StepPlan
    from hasten.serve.capacity import Capacity, attainment
    from hasten.serve.cost import BudgetChoice, IterationCost
    from hasten.serve.engine import Engine
    from hasten.serve.local import Pipeline, pipeline
    from hasten.serve.metrics import EffectiveThroughput, RequestRecord, ServingMetrics, summarise
    from hasten.serve.policy import Policy
    from hasten.serve.remote import Client, client
    from hasten.serve.request import FinishReason, Sequence, Status
    from hasten.serve.server import ServerConfig, ServerHandle, start
    from hasten.serve.simulate import SimulationReport, Simulator
    from hasten.serve.worker import WorkerConfig
    from hasten.serve.workload import RequestSpec, Workload

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

_HOMES = {
    "BudgetChoice": "cost",
    "Capacity": "capacity",
    "Chunk": "batch",
    "ChunkKind": "batch",
    "Client": "remote",
    "EffectiveThroughput": "metrics",
    "Engine": "engine",
    "FinishReason": "request",
    "IterationCost": "cost",
    "LeastTokens": "balance",
    "Observation": "batch",
    "Pipeline": "local",
    "Policy": "policy",
    "RequestRecord": "metrics",
    "RequestSpec": "workload",
    "RoundRobin": "balance",
    "Sequence": "request",
    "ServerConfig": "server",
    "ServerHandle": "server",
    "ServingMetrics": "metrics",
    "SimulationReport": "simulate",
    "Simulator": "simulate",
    "Status": "request",
    "StepPlan": "batch",
    "WorkerConfig": "worker",
    "Workload": "workload",
    "attainment": "capacity",
    "client": "remote",
    "pipeline": "local",
    "start": "server",
    "summarise": "metrics",
}
"""Where each name lives. A module is imported when first asked for: the front of a server then loads what it needs."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("bench", "policy", "workload"):
        return import_module(f"hasten.serve.{name}")
    if name in _HOMES:
        return getattr(import_module(f"hasten.serve.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hasten.serve' has no attribute {name!r}")
