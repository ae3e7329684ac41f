import pytest
import torch

from hasten.language.config import DecoderConfig
from hasten.language.loading import random_model
from hasten.studies import sarathi_serve as subject
from hasten.studies._serving import one_thread
from hasten.studies.study import Scale

QUICK = Scale(quick=True)


def tiny(scale, *, deterministic=False):
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=256,
    )
    return random_model(config, dtype="fp32", weights=torch.float32, deterministic=deterministic), "tiny"


def holds(checks):
    out = list(checks)
    assert out
    assert [c.name for c in out if c.holds is False] == []
    return {c.name: c for c in out}


def test_the_tail_is_shorter_than_prefill_firsts():
    assert holds(subject.tail(QUICK))["conv: P99 TBT, stall-free / prefill-first"].value < 0.45


def test_nothing_stalls_overtakes_or_leaks():
    assert len(holds(subject.no_stall(QUICK))) == 6


def test_without_a_gpu_table_two_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (check,) = subject.table_two(QUICK)
    assert check.holds is None
    assert "CUDA" in check.note


def test_a_policy_that_stalls_is_caught(monkeypatch):
    monkeypatch.setattr(subject, "StallFree", lambda token_budget, watermark: subject.PrefillFirst())
    checks = {c.name: c for c in subject.no_stall(QUICK)}
    assert checks["decodes stalled"].holds is False
    assert checks["steps over the budget"].holds is False


@pytest.mark.slow
def test_tokens_are_the_same_under_every_policy(monkeypatch):
    monkeypatch.setattr(subject, "small_model", tiny)
    with one_thread():
        checks = holds(subject.same_tokens(QUICK))
    assert any(c.holds for c in checks.values())
