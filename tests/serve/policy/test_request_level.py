from hasten.serve import Observation, Sequence
from hasten.serve.policy import RequestLevel
from hasten.testing.policy_kit import PolicyKit


class TestRequestLevel(PolicyKit):
    policy = RequestLevel(max_num_seqs=4)


def test_a_batch_runs_to_its_end_before_the_next_is_formed():
    running = [Sequence(0, 0.0, 8, 4, known=9, computed=8, blocks=1)]
    waiting = [Sequence(1, 1.0, 8, 4), Sequence(2, 2.0, 8, 4)]
    policy = RequestLevel(max_num_seqs=8)
    assert [c.seq for c in policy.decide(Observation(0.0, waiting, running, 50, 51, 16)).chunks] == [0]
    assert [c.seq for c in policy.decide(Observation(0.0, waiting, [], 51, 51, 16)).chunks] == [1, 2]


def test_the_batch_holds_only_requests_whose_longest_answer_fits():
    waiting = [Sequence(i, float(i), 16, 16) for i in range(3)]  # two blocks each with the answer
    assert len(RequestLevel().decide(Observation(0.0, waiting, [], 5, 5, 16)).chunks) == 2
