"""The block pool keeps its books under random use."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hasten.errors import CacheError, OutOfBlocksError
from hasten.language.cache import BlockPool


class Pool(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = BlockPool(num_blocks=12, block_size=4)
        self.open = {}  # sequence -> (tokens, computed)
        self.contents = {}  # block -> tokens that were written into it
        self.next = 0

    @rule(prefix=st.integers(0, 2), length=st.integers(1, 20), extra=st.integers(0, 3))
    def begin(self, prefix, length, extra):
        tokens = [prefix] * length + [100 + extra]
        seq, self.next = self.next, self.next + 1
        found = self.pool.open(seq, tokens)
        assert found % 4 == 0
        assert found < len(tokens)
        for number, block in enumerate(self.pool.table(seq)):  # what is shared really holds this prefix
            assert self.contents[block] == tokens[number * 4 : number * 4 + 4]
        self.open[seq] = (tokens, found)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), step=st.integers(1, 9))
    def compute(self, data, step):
        seq = data.draw(st.sampled_from(sorted(self.open)))
        tokens, computed = self.open[seq]
        goal = min(len(tokens), computed + step)
        free = self.pool.num_free
        if not self.pool.can_grow(seq, goal):
            with pytest.raises(OutOfBlocksError):
                self.pool.grow(seq, goal)
            assert self.pool.num_free == free
            return
        shared = len(self.pool.table(seq))
        self.pool.grow(seq, goal)
        table = self.pool.table(seq)
        for block in table[shared:]:
            self.contents[block] = []
        for number in range(computed // 4, -(-goal // 4)):
            self.contents[table[number]] = tokens[number * 4 : min(goal, number * 4 + 4)]
        self.open[seq] = (tokens, goal)
        self.pool.commit(seq, tokens[:goal])

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data):
        seq = data.draw(st.sampled_from(sorted(self.open)))
        self.pool.free(seq)
        del self.open[seq]

    @rule()
    def forget(self):
        self.pool.forget_prefixes()

    @invariant()
    def whole(self):
        self.pool.check_integrity()
        assert self.open or self.pool.num_free == 12


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_misuse_is_named():
    pool = BlockPool(2, 4)
    pool.open(0, [1])
    with pytest.raises(CacheError, match="already"):
        pool.open(0, [1])
    with pytest.raises(CacheError, match="at least one block"):
        BlockPool(0)
    with pytest.raises(KeyError):
        pool.free(7)


def test_without_sharing_nothing_is_found():
    pool = BlockPool(8, 4, prefix_sharing=False)
    for seq in range(2):
        assert pool.open(seq, range(9)) == 0
        pool.grow(seq, 9)
        pool.commit(seq, range(9))
        pool.free(seq)
