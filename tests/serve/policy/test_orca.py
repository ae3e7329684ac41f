from hasten.serve import Observation, Sequence
from hasten.serve.policy import Orca
from hasten.testing.policy_kit import PolicyKit


class TestOrca(PolicyKit):
    policy = Orca(max_num_seqs=6)


class TestOrcaThatReservesPromptsOnly(PolicyKit):
    policy = Orca(max_num_seqs=6, reserve_answer=False, max_batched_tokens=64)


def test_decodes_and_whole_prompts_share_a_step():
    running = [Sequence(0, 0.0, 9, 9, known=10, computed=9, blocks=1)]
    waiting = [Sequence(1, 1.0, 700, 4)]
    plan = Orca().decide(Observation(0.0, waiting, running, 500, 501, 16))
    assert [(c.seq, c.length) for c in plan.chunks] == [(0, 1), (1, 700)]


def test_answers_of_running_sequences_are_reserved():
    running = [Sequence(0, 0.0, 16, 64, known=17, computed=16, blocks=1)]  # may grow to five blocks
    waiting = [Sequence(1, 1.0, 16, 16)]  # two blocks
    policy = Orca()
    assert len(policy.decide(Observation(0.0, waiting, running, 5, 6, 16)).chunks) == 1
    assert len(policy.decide(Observation(0.0, waiting, running, 6, 7, 16)).chunks) == 2
