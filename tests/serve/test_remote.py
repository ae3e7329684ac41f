import pytest

from hasten.errors import ContextLengthError, EngineDeadError, InvalidRequestError
from hasten.serve import client


def test_the_client_speaks_to_the_server(server):
    one = client(server.url)
    assert one.healthy()
    assert one.models() == ["fake"]
    assert one.tokenize("hé") == [71, 127, 102]
    text = one.generate("hello", max_tokens=9, temperature=0)
    assert "".join(one.stream("hello", max_tokens=9, temperature=0)) == text
    assert one.complete("hello", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert isinstance(one.chat([{"role": "user", "content": "hi"}], max_tokens=3), str)
    assert isinstance(one.infill("a", "b", max_tokens=3), str)
    assert "hasten_num_requests_running" in one.metrics()


def test_errors_are_those_of_the_server(server):
    one = client(f"{server.url}/v1")
    with pytest.raises(ContextLengthError) as caught:
        one.generate("x" * 600)
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequestError, match="temperature"):
        one.generate("x", temperature=-1)


def test_nobody_there():
    assert not client("127.0.0.1:9").healthy()
    with pytest.raises(EngineDeadError, match="is it running"):
        client("127.0.0.1:9").generate("x")
    with pytest.raises(InvalidRequestError, match="no address"):
        client("ftp://x")
