"""GET /metrics: the engine's counters as Prometheus text, under vLLM's names.

The prefix is ``hasten_`` unless the user asks for another, such as ``vllm:`` so that dashboards made for vLLM work
as they are.
"""

from __future__ import annotations

from typing import Any

__all__ = ["render"]

_HELP = {
    "num_requests_running": "Sequences that hold cache blocks.",
    "num_requests_waiting": "Sequences that wait to be admitted.",
    "kv_cache_usage_perc": "Share of the KV cache blocks in use, 0 to 1.",
    "kv_cache_blocks": "KV cache blocks in all.",
    "prefix_cache_queries": "Tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens found in the prefix cache.",
    "prompt_tokens": "Prompt tokens of requests that got their first token.",
    "generation_tokens": "Tokens generated.",
    "num_preemptions": "Times that a running sequence lost its blocks.",
    "recomputed_tokens": "Tokens computed again after preemptions.",
    "engine_iterations": "Forward passes.",
    "spec_decode_num_drafts": "Verifications of guessed tokens.",
    "spec_decode_num_draft_tokens": "Guessed tokens that were verified.",
    "spec_decode_num_accepted_tokens": "Guessed tokens that stood.",
    "spec_decode_num_accepted_tokens_per_pos": "Guessed tokens that stood, by their place in the guess.",
    "kv_store_hits": "Pieces of prefixes that the KV store gave.",
    "kv_store_misses": "Pieces that were looked up and are not there.",
    "kv_store_refused": "Pieces that were corrupt or foreign, and were computed again.",
    "kv_store_written": "Pieces written.",
    "kv_store_bytes_written": "Bytes of those.",
    "kv_cache_bytes_per_token": "Bytes of keys and values that one token takes.",
    "kv_cache_bits": "Bits of a number in the KV cache: 8 (codes, with a scale for each token and head), 16 or 32.",
    "request_success": "Requests that ended, by reason.",
    "request_retries": "Requests submitted again, to another replica, after their engine process had ended.",
    "engine_restarts": "Engine processes that ended unexpectedly.",
    "requests_refused": "Requests turned away, by reason.",
    "engine_up": "1 while the engine process serves.",
    "iteration_tokens_total": "Tokens of one forward pass.",
    "time_to_first_token_seconds": "Arrival of a request to its first token.",
    "inter_token_latency_seconds": "One token to the next.",
    "request_time_per_output_token_seconds": "(last - first token) / (tokens - 1), per request.",
    "e2e_request_latency_seconds": "Arrival of a request to its last token.",
    "request_queue_time_seconds": "Arrival of a request to its first step.",
    "request_prompt_tokens": "Prompt length, per request.",
    "request_generation_tokens": "Answer length, per request.",
}


def _quote(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def render(snapshot: dict[str, Any] | None, front: dict[str, Any], *, prefix: str, model: str) -> str:
    """Prometheus text of an engine's ``stats()`` and of what the front counted itself.

    A gauge that is a mapping has one line for each replica, with the label ``engine`` as in vLLM.

    >>> print(render(None, {"gauges": {"engine_up": 0}}, prefix="hasten_", model="m").splitlines()[-1])
    hasten_engine_up{model_name="m"} 0
    """
    label = f'model_name="{_quote(model)}"'
    lines: list[str] = []

    def head(name: str, kind: str, shown: str | None = None) -> str:
        full = prefix + (shown or name)
        lines.append(f"# HELP {full} {_HELP.get(name, name)}")
        lines.append(f"# TYPE {full} {kind}")
        return full

    for part in (snapshot or {}, front):
        for name, value in part.get("gauges", {}).items():
            full = head(name, "gauge")
            if isinstance(value, dict):
                lines += [f'{full}{{{label},engine="{engine}"}} {each}' for engine, each in value.items()]
            else:
                lines.append(f"{full}{{{label}}} {value}")
        for name, value in part.get("counters", {}).items():
            name, _, place = name.partition("/")
            if not place or place == "0":
                full = head(name, "counter", name + "_total")
            lines.append(f"{full}{{{label}" + (f',position="{place}"' if place else "") + f"}} {value}")
        if "finished" in part:
            full = head("request_success", "counter", "request_success_total")
            lines += [f'{full}{{{label},finished_reason="{r}"}} {n}' for r, n in part["finished"].items()]
        if "refused" in part:
            full = head("requests_refused", "counter", "requests_refused_total")
            lines += [f'{full}{{{label},reason="{r}"}} {n}' for r, n in part["refused"].items()]
        for name, histogram in part.get("histograms", {}).items():
            full = head(name, "histogram")
            running = 0
            for bound, count in zip([*histogram["bounds"], "+Inf"], histogram["counts"], strict=True):
                running += count
                lines.append(f'{full}_bucket{{{label},le="{bound}"}} {running}')
            lines.append(f"{full}_sum{{{label}}} {histogram['sum']}")
            lines.append(f"{full}_count{{{label}}} {running}")
    return "\n".join(lines) + "\n"
