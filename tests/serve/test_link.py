import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import EngineDeadError
from hasten.serve.link import Link, Unpacker, pack


@given(st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=200))), st.lists(st.integers(1, 50), min_size=1))
def test_messages_survive_any_cut(messages, sizes):
    data = b"".join(pack(m) for m in messages)
    unpacker, out, at, turn = Unpacker(), [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        out += unpacker.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    assert out == messages


def test_both_ends():
    a, b = socket.socketpair()
    one, two = Link(a), Link(b)
    assert two.receive(0) == []
    big = "x" * 3_000_000  # more than the socket buffers
    sender = threading.Thread(target=one.send, args=("add", big))
    sender.start()
    got = []
    while not got:
        got = two.receive(5)
    sender.join()
    assert got == [("add", big)]
    a.close()
    with pytest.raises(EngineDeadError):
        two.receive(5)

    def flood():
        for _ in range(100):
            two.send("stats", 1)

    with pytest.raises(EngineDeadError):
        flood()
