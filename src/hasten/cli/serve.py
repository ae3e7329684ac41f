"""``hasten serve``: an OpenAI-compatible server whose knobs follow from an SLO."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Argument(help="Folder of a model, or the name of an embedded one.")] = "pycode-4m",
    slo: Annotated[
        str | None,
        typer.Option(help='Objectives such as "ttft<200ms, tpot<50ms, p99"; the token budget follows from them.'),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="stall-free, splitfuse, orca, prefill-first or request-level.")
    ] = "stall-free",
    token_budget: Annotated[int | None, typer.Option(help="Tokens of one step; overrides the SLO's.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that may run at once.")] = 128,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks of the KV cache.")] = None,
    kv_cache_memory: Annotated[str | None, typer.Option(help="Memory of the KV cache, such as 1GiB.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of one block.")] = 16,
    kv_precision: Annotated[
        str, typer.Option(help="Numbers of the KV cache: auto (as the activations) or int8, about half the bytes.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Precision of the weights: auto, fp32, bf16, int8, int4; fp8 on a GPU.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of the model's kernels.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Answers do not depend on what else is in the batch.")
    ] = False,
    speculate: Annotated[
        str,
        typer.Option(
            help="Guess tokens ahead: auto, off, draft, ngram, tree[:16], triforce[-means][:1024]. Same answers."
        ),
    ] = "auto",
    draft: Annotated[str | None, typer.Option(help="Small model that guesses; its vocabulary is the model's.")] = None,
    kv_store: Annotated[Path | None, typer.Option(help="Folder that keeps prefixes across restarts.")] = None,
    kv_store_quality: Annotated[
        str, typer.Option(help="How much stored prefixes may raise the perplexity, such as 1%, or exact.")
    ] = "1%",
    replicas: Annotated[int, typer.Option(help="Engine processes, each with its own weights and KV cache.")] = 1,
    balancer: Annotated[
        str, typer.Option(help="Places requests on replicas: least-tokens or round-robin.")
    ] = "least-tokens",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="HASTEN_API_KEY", help="What requests must send as Bearer token.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name of the model towards clients.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="File with a Jinja chat template.")] = None,
    metrics_prefix: Annotated[str, typer.Option(help='Before every metric, such as "vllm:".')] = "hasten_",
    max_queue: Annotated[int, typer.Option(help="Sequences that may wait, per replica; more get 429.")] = 512,
    calibration: Annotated[
        Path | None, typer.Option(help="File of the iteration cost; made if it is not there.")
    ] = None,
    drain_timeout: Annotated[str, typer.Option(help="Time for running requests after SIGTERM.")] = "120s",
    seed: Annotated[int | None, typer.Option(help="Fixes what requests without a seed draw.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Log as JSON lines.")] = False,
) -> None:
    """Serve MODEL over HTTP until a signal ends it; SIGTERM lets running requests finish."""
    from hasten.budget import SLO, parse_quantity
    from hasten.errors import ConfigurationError
    from hasten.serve.server import ServerConfig, run
    from hasten.serve.worker import WorkerConfig

    _log_to_stderr(json)
    if slo is not None:
        SLO.parse(slo)  # a slip of the pen should not cost a start-up
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    template = None
    if chat_template is not None:
        if not chat_template.is_file():
            raise ConfigurationError(f"--chat-template names {str(chat_template)!r}, which is no file")
        template = chat_template.read_text(encoding="utf-8")
    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        import logging

        logging.getLogger("hasten.serve").warning("listening on %s without --api-key: anybody there can use it", host)
    worker = WorkerConfig(
        model=model,
        options=options,
        policy=policy,
        token_budget=token_budget,
        slo=slo,
        calibration=None if calibration is None else str(calibration),
        max_num_seqs=max_num_seqs,
        num_blocks=num_blocks,
        cache_bytes=None if kv_cache_memory is None else parse_quantity(kv_cache_memory, "bytes"),
        block_size=block_size,
        threads=threads,
        deterministic=deterministic,
        seed=seed,
        kv_precision=kv_precision,
        speculate=speculate,
        draft=draft,
        kv_store=None if kv_store is None else str(kv_store),
        kv_quality=_quality(kv_store_quality),
    )
    run(
        ServerConfig(
            worker=worker,
            replicas=replicas,
            balancer=balancer,
            host=host,
            port=port,
            api_key=api_key,
            metrics_prefix=metrics_prefix,
            served_name=served_model_name,
            chat_template=template,
            max_queue=max_queue,
            drain_timeout=parse_quantity(drain_timeout, "time"),
        )
    )


def _quality(text: str) -> float | None:
    from hasten.errors import ConfigurationError

    if text == "exact":
        return None
    try:
        value = float(text.rstrip("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 < value < 1 or not text.endswith("%"):
        raise ConfigurationError(f"--kv-store-quality is {text!r}; give a percentage such as 1%, or exact")
    return value


def _log_to_stderr(as_json: bool) -> None:
    import json
    import logging

    class Lines(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return json.dumps({"level": record.levelname.lower(), "message": record.getMessage()})

    handler = logging.StreamHandler()
    handler.setFormatter(Lines() if as_json else logging.Formatter("%(levelname)-7s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
