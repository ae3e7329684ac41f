"""The result of a benchmark: the JSON keys and the table of ``vllm bench serve``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hasten.budget import SLO
from hasten.errors import ConfigurationError
from hasten.serve.metrics import RequestRecord, summarise

__all__ = ["goodput_slo", "result_json", "table"]

_NAMES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


def goodput_slo(pairs: Sequence[str]) -> SLO | None:
    """The objectives of ``--goodput``: pairs such as ``ttft:200`` in milliseconds; None without any.

    >>> goodput_slo(["ttft:200 tpot:50"]).ttft.limit
    0.2
    """
    limits: dict[str, Any] = {}
    for pair in re.split(r"[,\s]+", " ".join(pairs).strip()):
        if not pair:
            continue
        name, _, value = pair.partition(":")
        try:
            limit = float(value) / 1e3
        except ValueError:
            limit = math.nan
        if name not in ("ttft", "tpot", "itl", "e2el") or not limit > 0:
            raise ConfigurationError(
                f"--goodput got {pair!r}; write name:milliseconds, such as ttft:200, tpot:50, e2el:9000"
            )
        limits["e2e" if name == "e2el" else name] = limit
    return SLO(**limits) if limits else None


def _values(records: Sequence[RequestRecord], metric: str) -> np.ndarray:
    done = [r for r in records if r.ok]
    if metric == "itl":
        return np.array([gap for r in done for gap in r.itls], dtype=np.float64)
    field = {"ttft": "ttft", "tpot": "tpot", "e2el": "e2e"}[metric]
    values = np.array([getattr(r, field) for r in done], dtype=np.float64)
    return values[~np.isnan(values)]


def result_json(
    records: Sequence[RequestRecord],
    *,
    duration: float | None = None,
    slo: SLO | None = None,
    metrics: Sequence[str] = ("ttft", "tpot", "itl", "e2el"),
    percentiles: Sequence[float] = (99.0,),
    settings: dict[str, Any] | None = None,
    detailed: bool = False,
) -> dict[str, Any]:
    """Everything under vLLM's keys: latencies in milliseconds, the lists of ``detailed`` in seconds, as there."""
    summary = summarise(records, slo, duration)
    plain = summary.to_vllm_json()
    out: dict[str, Any] = dict(settings or {})
    for key, value in plain.items():
        if not re.match(r"(mean|median|std|p[0-9]+)_", key):
            out[key] = value
    if slo is None:
        out["request_goodput"] = None
    out["slo_attainment"] = None if slo is None else _number(summary.slo_attainment)
    for metric in metrics:
        if metric not in _NAMES:
            raise ConfigurationError(f"metric {metric!r} is not known; choose from {', '.join(_NAMES)}")
        values = _values(records, metric) * 1e3
        some = values.size > 0
        out[f"mean_{metric}_ms"] = float(values.mean()) if some else 0.0
        out[f"median_{metric}_ms"] = float(np.median(values)) if some else 0.0
        out[f"std_{metric}_ms"] = float(values.std()) if some else 0.0
        for percentile in percentiles:
            out[f"p{percentile:g}_{metric}_ms"] = float(np.percentile(values, percentile)) if some else 0.0
    if detailed:
        out["input_lens"] = [r.prompt_tokens for r in records]
        out["output_lens"] = [r.output_tokens for r in records]
        out["start_times"] = [r.arrival for r in records]
        out["ttfts"] = [_number(r.ttft) for r in records]
        out["itls"] = [r.itls for r in records]
        out["errors"] = [r.error or "" for r in records]
    return {key: _number(value) for key, value in out.items()}


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(result: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The result for a person, in vLLM's layout."""
    width = 50

    def line(name: str, value: Any, form: str = ".2f") -> str:
        text = "n/a" if value is None else (str(value) if isinstance(value, (int, str)) else format(value, form))
        return f"{name:<40} {text:<10}"

    lines = [" Serving Benchmark Result ".center(width, "=")]
    lines.append(line("Successful requests:", result["completed"]))
    lines.append(line("Failed requests:", result["failed"]))
    if result.get("max_concurrency") is not None:
        lines.append(line("Maximum request concurrency:", result["max_concurrency"]))
    if isinstance(result.get("request_rate"), (int, float)):
        lines.append(line("Request rate configured (RPS):", float(result["request_rate"])))
    lines.append(line("Benchmark duration (s):", result["duration"]))
    lines.append(line("Total input tokens:", result["total_input_tokens"]))
    lines.append(line("Total generated tokens:", result["total_output_tokens"]))
    lines.append(line("Request throughput (req/s):", result["request_throughput"]))
    if result.get("request_goodput") is not None:
        lines.append(line("Request goodput (req/s):", result["request_goodput"]))
        attained = result.get("slo_attainment")
        lines.append(line("SLO attainment (%):", None if attained is None else attained * 100))
    lines.append(line("Output token throughput (tok/s):", result["output_throughput"]))
    lines.append(line("Total token throughput (tok/s):", result["total_token_throughput"]))
    for metric in metrics:
        title, short = _NAMES[metric]
        lines.append(title.center(width, "-"))
        lines.append(line(f"Mean {short} (ms):", result[f"mean_{metric}_ms"]))
        lines.append(line(f"Median {short} (ms):", result[f"median_{metric}_ms"]))
        lines += [line(f"P{p:g} {short} (ms):", result[f"p{p:g}_{metric}_ms"]) for p in percentiles]
    lines.append("=" * width)
    return "\n".join(lines)
