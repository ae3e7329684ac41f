import random

import pytest
import torch

from hasten.clock import ManualClock
from hasten.errors import ConfigurationError
from hasten.serve.calibrate import measure_batches, shapes
from hasten.serve.cost import IterationCost


class TimedExecutor:
    """Advances a manual clock by a known cost; a first run of each shape is slower, as with real kernels."""

    vocab_size, max_context, bytes_per_token = 97, 1024, 256

    def __init__(self, cost, clock):
        self.cost, self.clock, self.seen, self.batches = cost, clock, set(), 0

    def new_cache(self, num_blocks, block_size=16):
        self.num_blocks = num_blocks
        return object()

    def step(self, batch, cache):
        lengths = batch.starts.diff().tolist()
        chunks = list(zip(batch.contexts.tolist(), lengths, strict=True))
        assert int(batch.block_tables.max()) < self.num_blocks
        assert int(batch.tokens.max()) < self.vocab_size
        for table, (context, length) in zip(batch.block_tables.tolist(), chunks, strict=True):
            used = table[: -(-(context + length) // 16)]
            assert len(set(used)) == len(used)
        warm = tuple(chunks) in self.seen
        self.seen.add(tuple(chunks))
        self.batches += 1
        self.clock.advance(self.cost.time(chunks) * (1 if warm else 7))
        return torch.zeros(len(chunks), self.vocab_size)


TRUE = IterationCost(m0=4e-3, m1=2e-7, m2=5e-5, a=1e-3, b=6e-5, c=3e-9, d=1e-6)


def test_calibration_finds_the_cost_of_the_executor_and_reports_what_it_kept_apart():
    clock = ManualClock()
    executor = TimedExecutor(TRUE, clock)
    shares = []
    cost = IterationCost.calibrate(executor, clock, time_limit=60.0, progress=shares.append, note="fake")
    assert cost.report.num_holdout > 5
    assert cost.report.holdout_median_relative_error < 0.01
    assert cost.report.note == "fake"
    assert cost.time([(500, 1)] * 16) == pytest.approx(TRUE.time([(500, 1)] * 16), rel=0.02)
    assert shares[-1] == 1.0


def test_on_a_shared_machine_the_minimum_finds_the_cost():
    class Disturbed(TimedExecutor):
        def step(self, batch, cache):
            before = self.clock.now()
            logits = super().step(batch, cache)
            if random.Random(self.batches).random() < 0.6:  # these runs share the cores with other work
                self.clock.advance(4 * (self.clock.now() - before))
            return logits

    clock = ManualClock()
    options = {"time_limit": 300.0, "progress": False, "repeats": 9}
    cost = IterationCost.calibrate(Disturbed(TRUE, clock), clock, statistic="minimum", **options)
    assert cost.time([(500, 1)] * 16) == pytest.approx(TRUE.time([(500, 1)] * 16), rel=0.05)
    median = IterationCost.calibrate(Disturbed(TRUE, clock), clock, **options)
    assert median.time([(500, 1)] * 16) > 1.3 * TRUE.time([(500, 1)] * 16)


def test_it_keeps_to_its_time_and_takes_the_most_telling_shapes_first():
    clock = ManualClock()
    executor = TimedExecutor(TRUE, clock)
    samples = measure_batches(executor, clock, time_limit=2.0, progress=False)
    assert 8 <= len(samples) < 100
    assert clock.now() < 4.0
    decodes = [chunks for chunks, _ in samples if all(n == 1 for _, n in chunks)]
    prompts = [chunks for chunks, _ in samples if any(n > 1 for _, n in chunks)]
    assert decodes
    assert prompts


def test_shapes_respect_every_limit():
    for batch in shapes(max_context=200, max_tokens=64, max_num_seqs=8, cache_tokens=1000):
        assert len(batch) <= 9
        assert sum(n for _, n in batch) <= 64
        assert all(c + n <= 200 for c, n in batch)
        assert sum(-(-(c + n) // 16) * 16 for c, n in batch) <= 1000


def test_a_model_that_is_too_small_is_refused():
    clock = ManualClock()
    executor = TimedExecutor(TRUE, clock)
    with pytest.raises(ConfigurationError, match="at least 8"):
        measure_batches(executor, clock, max_context=4, max_tokens=4, max_num_seqs=1, progress=False)
