"""Measure any OpenAI-compatible server from the outside."""

from hasten.serve.bench.dataset import Prompt, prompts_of
from hasten.serve.bench.drive import closed_loop, replay, run
from hasten.serve.bench.report import goodput_slo, result_json, table

__all__ = ["Prompt", "closed_loop", "goodput_slo", "prompts_of", "replay", "result_json", "run", "table"]
