"""A minimal OpenAI-style front for transformers' ContinuousBatchingManager, so that it can be served and measured.

Why not ``transformers serve``: its /v1/completions takes text only, and cannot be told to go on past the end token, so
lengths could not be held equal. The scheduler, paged cache and kernels are the same; this front does less per token
than the original's, which favours the peer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any


def build(model: str, threads: int, blocks: int, page: int, batch_tokens: int) -> tuple[Any, Any]:
    """The manager, started, and the tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    manager = network.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=64),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page, num_blocks=blocks, max_batch_tokens=batch_tokens, use_cuda_graph=False
        ),
    )
    with torch.inference_mode():  # the manager's thread takes over this mode
        manager.start()
    return manager, Tokenizer.from_file(f"{model}/tokenizer.json")


def application(manager: Any, tokenizer: Any, name: str) -> Any:
    """The web application: /v1/models and streamed /v1/completions."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"}]})

    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        news: asyncio.Queue[Any] = asyncio.Queue()
        key = f"r{next(numbers)}"
        manager.register_result_handler(key, news.put_nowait)
        manager.add_request(
            body["prompt"], request_id=key, max_new_tokens=int(body["max_tokens"]), streaming=True, eos_token_id=-1
        )
        return StreamingResponse(events(body, news), media_type="text/event-stream")

    async def events(body: dict[str, Any], news: asyncio.Queue[Any]) -> AsyncIterator[str]:
        sent, finished = 0, False
        while not finished:
            output = await news.get()
            if output.error:
                yield event({"error": {"message": output.error}})
                return
            finished = output.is_finished()
            tokens = output.generated_tokens
            for token in tokens[sent:]:
                sent += 1
                reason = "length" if finished and sent == len(tokens) else None
                text = tokenizer.decode([token])
                yield event({"choices": [{"index": 0, "text": text, "finish_reason": reason}]})
        counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": sent}
        yield event({"choices": [], "usage": counts | {"total_tokens": sum(counts.values())}})
        yield "data: [DONE]\n\n"

    def event(data: dict[str, Any]) -> str:
        return f"data: {json.dumps({'object': 'text_completion', 'model': name, **data})}\n\n"

    numbers = iter(range(1 << 62))
    return Starlette(routes=[Route("/v1/models", models), Route("/v1/completions", completions, methods=["POST"])])


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of the KV cache")
    parser.add_argument("--page", type=int, default=16, help="tokens of a page of the cache")
    parser.add_argument("--batch-tokens", type=int, default=512, help="tokens of a step at most")
    chosen = parser.parse_args()
    import uvicorn

    manager, tokenizer = build(
        chosen.model, chosen.threads, chosen.tokens // chosen.page, chosen.page, chosen.batch_tokens
    )
    try:
        uvicorn.run(application(manager, tokenizer, "peer"), port=chosen.port, log_level="warning", access_log=False)
    finally:
        manager.stop(hard_stop=True, timeout=5)


if __name__ == "__main__":
    main()
