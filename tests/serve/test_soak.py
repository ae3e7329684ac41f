"""Two thousand random requests with cancellations: the pool is whole, memory is flat, and the server still answers."""

import asyncio
import random

import httpx
import pytest

psutil = pytest.importorskip("psutil")


def memory(server):
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children()
    return sum(p.memory_info().rss for p in processes)


async def one(client, draw):
    body = {
        "prompt": "".join(draw.choice("abcdef ") for _ in range(draw.randrange(1, 120))),
        "max_tokens": draw.randrange(1, 60),
        "temperature": draw.choice([0, 1.0]),
        "n": draw.choice([1, 1, 1, 2]),
        "logprobs": draw.choice([None, None, 2]),
        "echo": draw.choice([False, False, True]),
        "stop": draw.choice([None, "a"]),
        "stream": draw.random() < 0.6,
        "priority": draw.randrange(3),
    }
    leave = draw.random() < 0.3
    try:
        if body["stream"]:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    if leave and draw.random() < 0.2:
                        return None
            return response.status_code
        limit = 0.02 if leave else 60.0
        return (await client.post("/v1/completions", json=body, timeout=limit)).status_code
    except httpx.TimeoutException:
        return None


async def storm(server, count, seed):
    draw = random.Random(seed)
    gate = asyncio.Semaphore(40)
    statuses = []
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=60)) as client:

        async def gated(index):
            async with gate:
                statuses.append(await one(client, random.Random(draw.random() + index)))

        await asyncio.gather(*(gated(i) for i in range(count)))
    return statuses


@pytest.mark.slow
def test_soak(start_fake):
    server = start_fake(max_num_seqs=16, num_blocks=60, max_queue=512)  # few blocks: preemptions happen
    asyncio.run(storm(server, 500, seed=0))
    before = memory(server)
    statuses = asyncio.run(storm(server, 2000, seed=1))
    assert {s for s in statuses if s is not None} == {200}
    assert sum(s is None for s in statuses) > 200  # cancellations happened
    with httpx.Client(base_url=server.url, timeout=20) as client:
        for _ in range(100):
            text = client.get("/metrics?check").text  # the engine verifies its books; it would end if they were wrong
            values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
            if values["hasten_num_requests_running"] + values["hasten_num_requests_waiting"] == 0:
                break
        assert values["hasten_kv_cache_usage_perc"] == 0
        assert values["hasten_engine_restarts_total"] == 0
        assert values["hasten_num_preemptions_total"] > 0
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    assert memory(server) - before < 24 << 20
