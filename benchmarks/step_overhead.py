"""What a step costs beside the model: 16 sequences decode together, four parts are timed.

schedule and sample: the engine's step less the executor's step inside it. send: the news of the step through the
worker's link, as bytes into a socket. receive: unpacking them at the front. detokenise: text and the server-sent event
of each token. The last two run in the front's process, where they overlap with the next step; the sum counts them all
the same.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from typing import Any

from harness import Row, median, options, report

from hasten.clock import MonotonicClock
from hasten.language import SamplingParams, load
from hasten.serve.engine import Engine
from hasten.serve.http.answer import Answer, Piece
from hasten.serve.link import Link, Unpacker

PARTS = ("schedule and sample", "send", "receive", "detokenise")
_clock = MonotonicClock()


class TimedExecutor:
    """Stands before an executor and notes how long its last step took."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.last = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def step(self, batch: Any, cache: Any) -> Any:
        """The executor's step."""
        begin = _clock.now()
        out = self._executor.step(batch, cache)
        self.last = _clock.now() - begin
        return out


def news_of(outputs: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A step's outputs as the worker sends them: short where there is only a token."""
    return [(o.seq, o.token) if o.finish is o.logprobs is o.timing is None else (o.seq, o.token, o) for o in outputs]


def measure(model: Any, sequences: int, steps: int, sampling: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each part, of the model and of the whole, for each step."""
    engine = Engine(model, max_num_seqs=sequences)
    timed = TimedExecutor(engine.executor)
    engine.executor = timed
    params = SamplingParams(max_tokens=steps + 24, ignore_eos=True, **sampling)
    prompts = [[16 + (i * 7 + n * 13) % 240 for i in range(32 + n)] for n in range(sequences)]
    answers = {engine.add(p, params): Answer(n, p, model.tokenizer, params) for n, p in enumerate(prompts)}
    near, far = socket.socketpair()
    link, arrived = Link(near), _Reader(far)
    unpacker = Unpacker()
    out: dict[str, list[float]] = {name: [] for name in (*PARTS, "model", "sum")}
    try:
        while engine.has_work and len(out["sum"]) < steps + 16:
            begin = _clock.now()
            outputs = engine.step()
            stepped = _clock.now()
            if len(outputs) < sequences:
                continue  # prompts are still being computed
            link.send("out", news_of(outputs))
            sent = _clock.now()
            data = arrived.take()
            got = _clock.now()
            messages = unpacker.feed(data)
            unpacked = _clock.now()
            for name, token, *rest in messages[0][1]:
                event(answers[name], token, rest[0] if rest else None, unpacked)
            written = _clock.now()
            parts = (stepped - begin - timed.last, sent - stepped, unpacked - got, written - unpacked)
            for name, seconds in zip(PARTS, parts, strict=True):
                out[name].append(seconds)
            out["model"].append(timed.last)
            out["sum"].append(sum(parts))
    finally:
        near.close()
        arrived.close()
    return {name: seconds[16:] for name, seconds in out.items()}  # the first steps warm up


class _Reader:
    """The other end of the link; whole messages, read in another thread as in another process."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._here = threading.Semaphore(0)
        self._messages: list[bytes] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while head := self._socket.recv(4, socket.MSG_WAITALL):
            size = int.from_bytes(head, "little")
            self._messages.append(head + self._socket.recv(size, socket.MSG_WAITALL))
            self._here.release()

    def take(self) -> bytes:
        """The next message."""
        self._here.acquire()
        return self._messages.pop(0)

    def close(self) -> None:
        """End the thread."""
        self._thread.join(5)
        self._socket.close()


def event(answer: Answer, token: int, output: Any, now: float) -> bytes:
    """The server-sent event of one token."""
    piece = Piece()
    answer.take(token, output, piece, now)
    choice = {"index": answer.index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}
    return f"data: {json.dumps({'object': 'text_completion', 'choices': [choice]})}\n\n".encode()


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--model", default="pycode-4m")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    chosen = parser.parse_args()
    import numba
    import torch

    torch.set_num_threads(chosen.threads)
    numba.set_num_threads(min(chosen.threads, numba.config.NUMBA_NUM_THREADS))
    model = load(chosen.model)
    rows: list[Row] = []
    details: dict[str, Any] = {}
    kinds = {"greedy": {"temperature": 0.0}, "sampled, top-p 0.9": {"temperature": 0.8, "top_p": 0.9}}
    for kind, sampling in kinds.items():
        times = measure(model, chosen.sequences, chosen.steps, sampling)
        details[kind] = {name: {"p50": median(t), "p99": sorted(t)[int(0.99 * len(t))]} for name, t in times.items()}
        whole = details[kind]["sum"]["p50"] * 1e3
        what = f"step overhead, {chosen.sequences} sequences, {kind}"
        note = ", ".join(f"{n} {details[kind][n]['p50'] * 1e3:.3f}" for n in (*PARTS, "model"))
        p99 = details[kind]["sum"]["p99"] * 1e3
        note += f" ms (medians); sum at p99 {p99:.3f} ms"
        rows.append(Row(what, ours=whole, unit="ms", score=whole, at_least=1.0, aim=0.3, limit=True, note=note))
    report(f"step overhead, {model.name}", rows, chosen.json, parts=details, threads=chosen.threads)


if __name__ == "__main__":
    main()
