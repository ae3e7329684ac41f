import pytest

from hasten.errors import ConfigurationError
from hasten.serve.balance import BALANCERS, LeastTokens, Load, RoundRobin, make_balancer


def test_round_robin_skips_the_dead():
    loads = [Load(), Load(alive=False), Load()]
    assert [RoundRobin().choose(n, 1, loads) for n in range(4)] == [0, 2, 0, 2]


def test_least_tokens_looks_at_the_work_not_at_the_count():
    loads = [Load(requests=1, tokens=5000), Load(requests=4, tokens=40), Load(requests=0, tokens=9000, alive=False)]
    assert LeastTokens().choose(0, 100, loads) == 1
    assert LeastTokens(answer=10_000).choose(0, 100, loads) == 0  # long answers: the count weighs more


def test_ties_go_round():
    loads = [Load(), Load(), Load()]
    assert [LeastTokens().choose(n, 1, loads) for n in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("name", BALANCERS)
def test_nobody_alive(name):
    with pytest.raises(ConfigurationError, match="none of 2 replicas"):
        make_balancer(name).choose(0, 1, [Load(alive=False)] * 2)


def test_unknown_balancer():
    with pytest.raises(ConfigurationError, match="round-robin"):
        make_balancer("random")
