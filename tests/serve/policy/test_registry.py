import pytest

from hasten.errors import ConfigurationError
from hasten.serve.policy import POLICIES, Policy, make


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_built_by_its_name_and_knows_it(name):
    policy = make(name, max_num_seqs=5)
    assert isinstance(policy, Policy)
    assert policy.name == name
    assert policy.max_num_seqs == 5


def test_other_spellings_and_empty_knobs():
    assert make("stall_free", token_budget=None) == make("sarathi")
    assert make("vLLM").name == "prefill-first"


def test_unknown_names_and_knobs_are_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match="stall-free"):
        make("fastest")
    with pytest.raises(ConfigurationError, match="max_batched_tokens"):
        make("orca", token_budget=3)
