import pickle

import pytest

from hasten.errors import InvalidRequestError
from hasten.language.params import GrammarSpec, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("min_tokens", 17),
        ("logprobs", 101),
        ("prompt_logprobs", -1),
        ("seed", 2**64),
        ("stop", ("",)),
    ],
)
def test_a_field_out_of_bounds_is_named(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert repr(value) in str(caught.value)


def test_make_reads_what_requests_hold():
    params = SamplingParams.make(stop="END", logit_bias={"5": 1, 7: -2.0}, max_tokens=3)
    assert params.stop == ("END",)
    assert params.logit_bias == ((5, 1.0), (7, -2.0))
    with pytest.raises(InvalidRequestError, match="token ids"):
        SamplingParams.make(logit_bias={"five": 1})


def test_vocabulary_is_checked():
    SamplingParams(logit_bias=((9, 1.0),), stop_token_ids=(0,)).check_vocabulary(10)
    with pytest.raises(InvalidRequestError, match="0 to 9"):
        SamplingParams(stop_token_ids=(10,)).check_vocabulary(10)


def test_params_travel_between_processes():
    params = SamplingParams(seed=3, grammar=GrammarSpec("regex", "a+"), stop=("x",))
    assert pickle.loads(pickle.dumps(params)) == params


def test_an_unknown_grammar_kind_is_refused():
    with pytest.raises(InvalidRequestError, match="known kinds"):
        GrammarSpec("xml")
