import pytest
from fakes import fake_model

from hasten.errors import ConfigurationError
from hasten.serve import pipeline


def test_texts_in_completions_out():
    pipe = pipeline(fake_model(), policy="splitfuse", token_budget=128, num_blocks=64)
    one, two = pipe(["hello", "world"], max_new_tokens=12, temperature=0.0)
    assert len(one.tokens) == len(two.tokens) == 12
    assert pipe("hello", max_new_tokens=12, temperature=0.0)[0].text == one.text
    assert "".join(pipe.stream("world", max_new_tokens=12, temperature=0.0)) == two.text
    assert pipe.engine.policy.name == "splitfuse"


def test_an_unknown_knob_is_refused():
    with pytest.raises(ConfigurationError, match="no knob"):
        pipeline(fake_model(), policy="orca", colour="red")
