"""The worker of one contender: loads a model, then answers commands from a pipe, one JSON line each.

Commands: ``decode`` (greedy, several sequences together), ``prefill``, ``logits`` of a prompt's last token, and for
ours ``bandwidth``. Times are taken here, around the loop alone. Everything a library prints goes to the log.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from hasten.clock import Clock, MonotonicClock

_LONGEST = 512
"""tokens of a sequence that room is made for"""
_MOST = 16
"""sequences together"""
_clock: Clock = MonotonicClock()


def prompt(length: int, number: int = 0) -> list[int]:
    """Token ids of a prompt; the same for every contender."""
    return [16 + (i * 7 + number * 13) % 240 for i in range(length)]


class Runtime(Protocol):
    """What a contender can do."""

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        """Seconds for ``tokens`` greedy steps of ``sequences`` that have ``context`` tokens each."""
        ...

    def prefill(self, length: int) -> float:
        """Seconds from nothing to the logits of the last of ``length`` prompt tokens."""
        ...

    def logits(self, tokens: Sequence[int]) -> list[float]:
        """Logits (vocabulary,) behind ``tokens``."""
        ...


class Hasten:
    """Our executor, without the engine around it."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import torch

        from hasten.language import load

        torch.set_num_threads(threads)
        self._executor = load(model, dtype=precision).executor
        self._width = -(-_LONGEST // 16)
        self._cache = self._executor.new_cache(_MOST * self._width, 16)
        self.info = {
            "precision": self._executor.precision,
            "weight_bytes": self._executor.weight_bytes,
            "bytes_per_token": self._executor.bytes_per_token,
        }

    def _table(self, number: int) -> list[int]:
        return list(range(number * self._width, (number + 1) * self._width))

    def _step(self, chunks: list[tuple[list[int], int, list[int]]]) -> Any:
        from hasten.language import RaggedBatch

        return self._executor.step(RaggedBatch.build(chunks), self._cache)

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        if sequences > _MOST or context + tokens > _LONGEST:
            raise ValueError(f"there is room for {_MOST} sequences of {_LONGEST} tokens")
        tables = [self._table(n) for n in range(sequences)]
        chunks = [(prompt(context, n), 0, tables[n]) for n in range(sequences)]
        last = [int(self._step([chunk])[0].argmax()) for chunk in chunks]
        begin = _clock.now()
        for at in range(context, context + tokens):
            logits = self._step([([t], at, table) for t, table in zip(last, tables, strict=True)])
            last = logits.numpy().argmax(1).tolist()
        return _clock.now() - begin

    def prefill(self, length: int) -> float:
        if length > _LONGEST:
            raise ValueError(f"there is room for {_LONGEST} tokens")
        chunk = (prompt(length), 0, self._table(0))
        begin = _clock.now()
        int(self._step([chunk])[0].argmax())
        return _clock.now() - begin

    def logits(self, tokens: Sequence[int]) -> list[float]:
        return [float(x) for x in self._step([(list(tokens), 0, self._table(0))])[0]]

    def bandwidth(self) -> float:
        """Bytes per second that this process can read from memory."""
        from hasten.measure.bandwidth import measure_ceilings

        return measure_ceilings(refresh=True, limit=0.4, width=256).read


class Transformers:
    """transformers, not compiled: explicit forward calls with a DynamicCache."""

    def __init__(self, model: str, attention: str, threads: int) -> None:
        _need("transformers")
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch = torch
        self._cache_type = transformers.DynamicCache
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation=attention
        ).eval()
        self.info = {"version": transformers.__version__, "attention": attention}

    def _forward(self, ids: Any, cache: Any) -> Any:
        return self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        torch = self._torch
        with torch.inference_mode():
            cache = self._cache_type()
            ids = torch.tensor([prompt(context, n) for n in range(sequences)])
            last = self._forward(ids, cache).argmax(-1, keepdim=True)
            begin = _clock.now()
            for _ in range(tokens):
                last = self._forward(last, cache).argmax(-1, keepdim=True)
            last.tolist()
            return _clock.now() - begin

    def prefill(self, length: int) -> float:
        torch = self._torch
        with torch.inference_mode():
            begin = _clock.now()
            int(self._forward(torch.tensor([prompt(length)]), self._cache_type()).argmax())
            return _clock.now() - begin

    def logits(self, tokens: Sequence[int]) -> list[float]:
        with self._torch.inference_mode():
            return [float(x) for x in self._forward(self._torch.tensor([list(tokens)]), self._cache_type())[0].float()]


class LlamaCpp:
    """llama.cpp through the low-level functions of llama-cpp-python."""

    def __init__(self, model: str, threads: int) -> None:
        _need("llama_cpp", "llama-cpp-python")
        import llama_cpp

        self._lib = lib = llama_cpp
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(os.fsencode(model), lib.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}; write it with random_model.py --gguf")
        params = lib.llama_context_default_params()
        params.n_ctx = _MOST * _LONGEST
        params.n_batch = params.n_ubatch = _LONGEST
        params.n_seq_max = _MOST
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, params)
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(_LONGEST, 0, 1)
        self.info = {"version": llama_cpp.__version__, "system": lib.llama_print_system_info().decode()}

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise SystemExit(f"llama_decode answered {status}")

    def _row(self, index: int) -> Any:
        import numpy as np

        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, index), shape=(self._vocab,))

    def _read(self, tokens: Sequence[int], sequence: int = 0) -> Any:
        last = len(tokens) - 1
        self._decode([(token, at, sequence, at == last) for at, token in enumerate(tokens)])
        return self._row(last)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        self._clear()
        last = [int(self._read(prompt(context, n), n).argmax()) for n in range(sequences)]
        begin = _clock.now()
        for at in range(context, context + tokens):
            self._decode([(token, at, n, True) for n, token in enumerate(last)])
            last = [int(self._row(n).argmax()) for n in range(sequences)]
        return _clock.now() - begin

    def prefill(self, length: int) -> float:
        self._clear()
        begin = _clock.now()
        int(self._read(prompt(length)).argmax())
        return _clock.now() - begin

    def logits(self, tokens: Sequence[int]) -> list[float]:
        self._clear()
        return [float(x) for x in self._read(tokens)]


def _need(module: str, package: str | None = None) -> None:
    if find_spec(module) is None:
        raise ModuleNotFoundError(f"{package or module} is not installed")


KINDS = {"hasten": Hasten, "transformers": Transformers, "llama.cpp": LlamaCpp}


def main() -> None:
    """Serve commands until the pipe closes."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def answer(**reply: Any) -> None:
        channel.write(json.dumps(reply) + "\n")
        channel.flush()

    kind, options = sys.argv[1], json.loads(sys.argv[2])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):  # libraries read them when they load
        os.environ[name] = str(options["threads"])
    try:
        runtime = KINDS[kind](**options)
    except ModuleNotFoundError as error:
        return answer(absent="not installed" if "not installed" in str(error) else str(error))
    except (Exception, SystemExit) as error:
        return answer(absent=f"{type(error).__name__}: {error}")
    answer(result=runtime.info)
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            answer(result=getattr(runtime, command)(**arguments))
        except (Exception, SystemExit) as error:
            answer(absent=f"{command} failed: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
