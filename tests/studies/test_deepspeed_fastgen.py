import pytest
import torch

from hasten.language.config import DecoderConfig
from hasten.language.loading import random_model
from hasten.serve.policy import SplitFuse
from hasten.studies import deepspeed_fastgen as subject
from hasten.studies._serving import one_thread
from hasten.studies.study import Scale

QUICK = Scale(quick=True)


@pytest.mark.parametrize("part", ["constant_passes", "even_split", "no_deadlock", "latency", "scaling"])
def test_every_simulated_check_of_the_card_holds(part):
    checks = list(getattr(subject, part)(QUICK))
    assert checks
    assert [c.name for c in checks if not c.holds] == []


def test_a_budget_that_is_not_kept_constant_is_caught(monkeypatch):
    monkeypatch.setattr(subject, "SplitFuse", lambda **knobs: subject.PrefillFirst(max_num_seqs=32))
    failed = [c.name for c in subject.constant_passes(QUICK) if c.holds is False]
    assert "tokens per pass, variation, splitfuse" in failed
    assert "passes before the last that are not exactly the budget" in failed


def test_all_splits_are_tried():
    assert sorted(subject._compositions(5, 2)) == [(1, 4), (2, 3)]
    assert len(list(subject._compositions(20, 3))) == 33


def test_the_scheduler_cuts_a_lone_prompt_evenly():
    assert subject._chosen(160, 64, 16) == [64, 48, 48]
    assert SplitFuse(token_budget=768).split == "even"


def tiny(scale, *, deterministic=False):
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=512,
    )
    return random_model(config, dtype="fp32", weights=torch.float32, deterministic=deterministic), "tiny"


@pytest.mark.slow
def test_the_real_engine_is_measured_and_gives_the_same_answers(monkeypatch):
    monkeypatch.setattr(subject, "small_model", tiny)
    with one_thread():
        tail, answers = subject.real_engine(QUICK)
    assert tail.value > 0
    assert "95 % CI" in tail.note
    assert answers.holds
