"""``hasten bench serve``: load any OpenAI-compatible server and say what its users experience."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["bench_serve"]


def bench_serve(
    backend: Annotated[str, typer.Option(help="openai (completions) or openai-chat.")] = "openai",
    base_url: Annotated[str | None, typer.Option(help="Address of the server; else from --host and --port.")] = None,
    host: Annotated[str, typer.Option(help="Host of the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the server.")] = 8000,
    endpoint: Annotated[str | None, typer.Option(help="Path of the requests.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for; the server's first if left out.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as Bearer token.")] = None,
    dataset_name: Annotated[str, typer.Option(help="random, custom or trace.")] = "random",
    dataset_path: Annotated[Path | None, typer.Option(help="File of the custom dataset (JSON lines).")] = None,
    random_input_len: Annotated[int, typer.Option(help="Mean tokens of a random prompt.")] = 256,
    random_output_len: Annotated[int, typer.Option(help="Mean tokens of its answer.")] = 128,
    random_range_ratio: Annotated[float, typer.Option(help="Lengths vary by this share, 0 to below 1.")] = 0.0,
    custom_output_len: Annotated[int, typer.Option(help="Tokens of an answer to a custom prompt.")] = 256,
    trace: Annotated[
        str | None, typer.Option(help="Azure or Mooncake trace file, or the samples conversation and code.")
    ] = None,
    trace_speed: Annotated[float, typer.Option(help="How many times as fast the trace is replayed.")] = 1.0,
    trace_max_prompt: Annotated[
        int | None, typer.Option(help="Shrink prompts in proportion so that they have at most this many tokens.")
    ] = None,
    trace_max_output: Annotated[int | None, typer.Option(help="Shrink answers likewise.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Requests in all; 1000, or the whole trace.")] = None,
    request_rate: Annotated[float | None, typer.Option(help="Requests per second; inf sends all at once.")] = None,
    burstiness: Annotated[float, typer.Option(help="1 is Poisson, below 1 is burstier.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests under way at most.")] = None,
    clients: Annotated[
        str | None, typer.Option(help="Closed loop: clients that wait for their answer, such as 8, 1,4,16 or 1..32.")
    ] = None,
    num_warmups: Annotated[int, typer.Option(help="Requests beforehand that do not count.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of lengths, arrivals and prompts.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Answers have their whole length.")
    ] = True,
    goodput: Annotated[
        list[str] | None, typer.Option(help='Objectives in milliseconds, such as "ttft:200 tpot:50".')
    ] = None,
    percentile_metrics: Annotated[str, typer.Option(help="Metrics to report.")] = "ttft,tpot,itl",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles to report.")] = "99",
    save_result: Annotated[bool, typer.Option("--save-result", help="Write the JSON to a file.")] = False,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="With the values of every request.")] = False,
    result_dir: Annotated[Path, typer.Option(help="Folder of that file.")] = Path("."),
    result_filename: Annotated[str | None, typer.Option(help="Name of that file.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE pairs for the JSON.")] = None,
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", help="No progress bar.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of the table.")] = False,
) -> None:
    """Send requests to a server, measure TTFT, TPOT, ITL and goodput, and print or save the result.

    Option names and JSON keys are those of `vllm bench serve`.
    """
    from hasten.serve.bench.report import goodput_slo

    path, chat = _endpoint(backend, endpoint)
    url = base_url or f"http://{host}:{port}"
    prompts: list[Any]
    rate: float | None
    if trace is not None or dataset_name == "trace":
        source = trace or (str(dataset_path) if dataset_path else "conversation")
        prompts = _trace(source, num_prompts, trace_speed, trace_max_prompt, trace_max_output, seed, chat)
        dataset_name, rate = "trace", request_rate
    else:
        lengths = (random_input_len, random_output_len, random_range_ratio)
        prompts = _dataset(dataset_name, num_prompts or 1000, dataset_path, lengths, custom_output_len, seed, chat)
        rate = float("inf") if request_rate is None else request_rate
    metrics = [m.strip() for m in percentile_metrics.split(",") if m.strip()]
    report = (goodput_slo(goodput or []), metrics, _percentiles(metric_percentiles), save_detailed)
    options: dict[str, Any] = {
        "model": model, "endpoint": path, "ignore_eos": ignore_eos, "temperature": temperature, "api_key": api_key,
    }  # fmt: skip
    settings = _settings(backend, model, dataset_name, len(prompts), rate, burstiness, max_concurrency, metadata or [])
    if num_warmups:
        from hasten.serve.bench import run

        run(url, prompts[: min(num_warmups, len(prompts))], clients=1, **options)
    results = []
    for seats in _counts(clients):
        result = _measure(
            url, prompts, rate, burstiness, max_concurrency, seed, seats, options, settings, report,
            quiet=disable_tqdm or json,
        )  # fmt: skip
        results.append(result)
        if not json:
            from hasten.serve.bench.report import table

            print(table(result, metrics, report[2]))
    out = results[0] if clients is None or len(results) == 1 else {**settings, "points": results}
    if json:
        import json as codec

        print(codec.dumps(out))
    if save_result:
        _save(out, result_dir, result_filename, backend, rate, model)


def _endpoint(backend: str, endpoint: str | None) -> tuple[str, bool]:
    """Path of the requests, and whether they are chats."""
    from hasten.errors import ConfigurationError

    if backend not in ("openai", "vllm", "openai-chat", "vllm-chat"):
        raise ConfigurationError(f"backend {backend!r} is not known; choose openai or openai-chat")
    chat = backend in ("openai-chat", "vllm-chat")
    path = endpoint or ("/v1/chat/completions" if chat else "/v1/completions")
    return path, chat or "chat" in path


def _settings(
    backend: str, model: str | None, dataset: str, prompts: int, rate: float | None, burstiness: float,
    max_concurrency: int | None, metadata: list[str],
) -> dict[str, Any]:  # fmt: skip
    """What the JSON says of the run, in the vocabulary of ``vllm bench serve``; ``metadata`` may overwrite it."""
    settings: dict[str, Any] = {
        "endpoint_type": backend,
        "backend": backend,
        "label": None,
        "model_id": model,
        "tokenizer_id": None,
        "dataset_name": dataset,
        "num_prompts": prompts,
        "request_rate": "trace" if rate is None else ("inf" if rate == float("inf") else rate),
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
    }
    for pair in metadata:
        key, _, value = pair.partition("=")
        settings[key] = value
    return settings


def _percentiles(text: str) -> list[float]:
    from hasten.errors import ConfigurationError

    try:
        return [float(p) for p in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--metric-percentiles is {text!r}; write for example 50,90,99") from None


def _counts(clients: str | None) -> list[int | None]:
    """``None`` for an open loop; numbers of clients for a closed one: 8, 1,4,16, or 1..32 in powers of two."""
    from hasten.errors import ConfigurationError

    if clients is None:
        return [None]
    try:
        if ".." in clients:
            low, high = (int(part) for part in clients.split("..", 1))
            counts = [low]
            while counts[-1] * 2 < high:
                counts.append(counts[-1] * 2)
            counts += [high] if high > low else []
        else:
            counts = [int(part) for part in clients.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigurationError(
            f"--clients is {clients!r}; write a number, a list such as 1,4,16, or a range such as 1..32"
        )
    return list(counts)


def _dataset(
    name: str,
    count: int,
    path: Path | None,
    lengths: tuple[int, int, float],
    custom_output_len: int,
    seed: int,
    chat: bool,
) -> list[Any]:
    from hasten.errors import ConfigurationError
    from hasten.serve.bench.dataset import custom, prompts_of, random_specs

    if name not in ("random", "custom"):
        raise ConfigurationError(f"dataset {name!r} is not known; choose random, custom or trace")
    if count < 1:
        raise ConfigurationError(f"--num-prompts is {count}; ask for at least 1")
    if name == "custom":
        if path is None:
            raise ConfigurationError(
                "--dataset-name custom needs --dataset-path, a file of JSON lines with a prompt each"
            )
        return custom(path, count, custom_output_len)
    if not 0 <= lengths[2] < 1:
        raise ConfigurationError(f"--random-range-ratio is {lengths[2]}; it must be from 0 to below 1")
    return prompts_of(random_specs(count, *lengths, seed), seed=seed, as_text=chat)


def _trace(
    source: str, count: int | None, speed: float, max_prompt: int | None, max_output: int | None, seed: int, chat: bool
) -> list[Any]:
    from hasten.errors import ConfigurationError
    from hasten.serve import workload
    from hasten.serve.bench.dataset import prompts_of

    if not speed > 0:
        raise ConfigurationError(f"--trace-speed is {speed}; give a positive factor, 2 replays twice as fast")
    requests = workload.load(source, requests=count, seed=seed)
    if speed != 1.0 and len(requests) > 1 and requests.duration > 0:
        requests = requests.at_rate(requests.rate * speed, burstiness=None)
    if max_prompt is not None or max_output is not None:
        requests = requests.scaled(max_prompt=max_prompt or 1 << 30, max_output=max_output or 1 << 30)
    return prompts_of(list(requests), seed=seed, as_text=chat)


def _measure(
    url: str,
    prompts: list[Any],
    rate: float | None,
    burstiness: float,
    max_concurrency: int | None,
    seed: int,
    clients: int | None,
    options: dict[str, Any],
    settings: dict[str, Any],
    report: tuple[Any, list[str], list[float], bool],
    *,
    quiet: bool,
) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hasten.clock import MonotonicClock
    from hasten.serve.bench.drive import run
    from hasten.serve.bench.report import result_json

    slo, metrics, percentiles, detailed = report
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    clock = MonotonicClock()
    with Progress(*columns, console=Console(stderr=True), disable=quiet, refresh_per_second=2) as bar:
        task = bar.add_task("requests" if clients is None else f"{clients} clients", total=len(prompts))
        extra: dict[str, Any] = {} if clients is not None else {"max_concurrency": max_concurrency}
        begin = clock.now()
        records = run(
            url,
            prompts,
            request_rate=rate,
            burstiness=burstiness,
            seed=seed,
            clients=clients,
            progress=lambda: bar.advance(task),
            **extra,
            **options,
        )
        duration = clock.now() - begin
    if clients is not None:
        settings = {**settings, "clients": clients, "max_concurrency": clients}
    return result_json(
        records,
        duration=duration,
        slo=slo,
        metrics=metrics,
        percentiles=percentiles,
        settings=settings,
        detailed=detailed,
    )


def _save(
    result: dict[str, Any], folder: Path, name: str | None, backend: str, rate: float | None, model: str | None
) -> None:
    import json

    from hasten.files import write_text

    label = "trace" if rate is None else f"{rate:g}qps"
    path = folder / (name or f"{backend}-{label}-{(model or 'model').split('/')[-1]}.json")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result) + "\n")
    print(f"saved {path}")
