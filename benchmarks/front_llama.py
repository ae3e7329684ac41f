"""llama.cpp's own server out of the package xllamacpp, where no llama-server binary is at hand.

The wheels of that package are built for AVX2; a ``llama-server`` built on the machine itself (``serving.py
--llama-server``) is the stronger peer on a processor with AVX-512.
"""

from __future__ import annotations

import argparse
import signal
import threading


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16, help="sequences at once")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of the KV cache, all slots together")
    chosen = parser.parse_args()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = chosen.model
    params.hostnames = ["127.0.0.1"]
    params.port = chosen.port
    params.n_ctx, params.n_parallel = chosen.tokens, chosen.slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = chosen.threads
    params.cont_batching = True
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    ended.wait()


if __name__ == "__main__":
    main()
