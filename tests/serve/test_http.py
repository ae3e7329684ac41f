"""The HTTP interface over real sockets, mostly through the official OpenAI client."""

import json

import httpx
import pytest

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture(scope="module")
def raw(server):
    with httpx.Client(base_url=server.url, timeout=20) as made:
        yield made


class TestCompletions:
    def test_whole_and_streamed_answers_agree(self, client):
        fields = {"model": "fake", "prompt": "hello", "max_tokens": 40, "temperature": 0}
        whole = client.completions.create(**fields)
        assert whole.object == "text_completion"
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 40
        assert whole.usage.prompt_tokens == 5
        chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
        assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == 40
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert {c.id for c in chunks} == {chunks[0].id}

    def test_timings(self, client):
        answer = client.completions.create(model="fake", prompt="hello", max_tokens=5)
        timings = answer.model_extra["timings"]
        assert 0 <= timings["queue"] <= timings["ttft"] <= timings["e2e"]
        assert timings["output_tokens"] == 5
        assert timings["tokens_per_second"] == pytest.approx(1 / timings["tpot"])

    def test_several_prompts_and_answers_keep_their_order(self, client):
        many = client.completions.create(model="fake", prompt=["one", "two"], n=3, max_tokens=6, seed=1)
        assert [c.index for c in many.choices] == list(range(6))
        assert len({c.text for c in many.choices}) == 6
        alone = client.completions.create(model="fake", prompt="two", n=3, max_tokens=6, seed=1)
        assert [c.text for c in alone.choices] == [c.text for c in many.choices[3:]]
        assert many.usage.completion_tokens == 36

    def test_tokens_as_prompt(self, client, raw):
        ids = raw.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
        fields = {"model": "fake", "max_tokens": 8, "temperature": 0}
        text = client.completions.create(prompt="hello", **fields).choices[0].text
        assert client.completions.create(prompt=ids, **fields).choices[0].text == text
        assert client.completions.create(prompt=[ids, ids], **fields).choices[1].text == text

    def test_best_of_returns_the_likeliest(self, client):
        fields = {"model": "fake", "prompt": "hello", "max_tokens": 4, "seed": 3, "logprobs": 0}
        all_of_them = client.completions.create(n=6, **fields)
        best = client.completions.create(n=2, best_of=6, **fields)
        score = {c.text: sum(c.logprobs.token_logprobs) for c in all_of_them.choices}
        expected = sorted(score, key=lambda t: -score[t])[:2]
        assert [c.text for c in best.choices] == expected
        assert best.usage.completion_tokens == 24

    def test_logprobs(self, client):
        answer = client.completions.create(model="fake", prompt="hello", max_tokens=5, temperature=0, logprobs=3)
        logs = answer.choices[0].logprobs
        assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.top_logprobs) == len(logs.text_offset) == 5
        assert all(len(top) == 3 for top in logs.top_logprobs)
        assert all(max(t.values()) == v for t, v in zip(logs.top_logprobs, logs.token_logprobs, strict=True))

    def test_echo_with_logprobs_scores_the_prompt(self, client):
        answer = client.completions.create(model="fake", prompt="hello", max_tokens=0, echo=True, logprobs=1)
        choice = answer.choices[0]
        assert choice.text == "hello"
        assert choice.logprobs.tokens == list("hello")
        assert choice.logprobs.token_logprobs[0] is None
        assert all(v < 0 for v in choice.logprobs.token_logprobs[1:])
        assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
        streamed = client.completions.create(
            model="fake", prompt="hello", max_tokens=3, echo=True, stream=True, temperature=0
        )
        assert "".join(c.choices[0].text for c in streamed).startswith("hello")

    def test_stop_strings(self, client):
        fields = {"model": "fake", "prompt": "hello", "max_tokens": 60, "temperature": 0}
        text = client.completions.create(**fields).choices[0].text
        stop = text[10:12]
        answer = client.completions.create(**fields, stop=[stop, "never there"])
        assert answer.choices[0].text == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].model_extra["stop_reason"] == stop
        chunks = list(client.completions.create(**fields, stop=stop, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == answer.choices[0].text
        assert chunks[-1].choices[0].finish_reason == "stop"

    def test_suffix_asks_for_the_gap(self, raw):
        answer = raw.post("/v1/completions", json={"prompt": "a = (", "suffix": ")", "max_tokens": 3}).json()
        assert answer["usage"]["prompt_tokens"] == len("a = (") + len(")") + 3

    def test_vllm_fields(self, client):
        fields = {"model": "fake", "prompt": "hello", "max_tokens": 12, "temperature": 1.0, "seed": 5}
        one = client.completions.create(**fields, extra_body={"top_k": 1}).choices[0].text
        assert one == client.completions.create(**(fields | {"temperature": 0})).choices[0].text
        extra = {"min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 3, "priority": 2}
        answer = client.completions.create(**fields, extra_body=extra | {"slo": "ttft<200ms, tpot<50ms"})
        assert answer.usage.completion_tokens == 12
        scored = client.completions.create(**fields, extra_body={"prompt_logprobs": 1})
        assert len(scored.choices[0].model_extra["prompt_logprobs"]) == 5

    def test_guided_answers(self, raw):
        pytest.importorskip("xgrammar")
        body = {"prompt": "x", "max_tokens": 20}
        answer = raw.post("/v1/completions", json=body | {"guided_regex": "[0-9]{4}"}).json()["choices"][0]
        assert answer["text"].isdigit()
        assert answer["finish_reason"] == "stop"
        assert raw.post("/v1/completions", json=body | {"guided_choice": ["yes", "no"]}).json()["choices"][0][
            "text"
        ] in (
            "yes",
            "no",
        )
        refused = raw.post("/v1/completions", json=body | {"guided_regex": "[0-9"})
        assert refused.status_code == 400
        assert "cannot be compiled" in refused.json()["error"]["message"]
        refused = raw.post("/v1/completions", json=body | {"guided_regex": "[0-9", "stream": True})
        assert refused.status_code == 400


class TestChat:
    MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]

    def test_whole_and_streamed_answers_agree(self, client):
        fields = {"model": "fake", "messages": self.MESSAGES, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**fields)
        assert whole.choices[0].message.role == "assistant"
        chunks = list(client.chat.completions.create(**fields, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert all(c.choices[0].delta.role is None for c in chunks[1:])
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content

    def test_the_template_is_used(self, client, raw):
        count = raw.post("/tokenize", json={"messages": self.MESSAGES}).json()["count"]
        answer = client.chat.completions.create(model="fake", messages=self.MESSAGES, max_tokens=1)
        assert answer.usage.prompt_tokens == count == 1 + len("be brief\n") + 1 + len("hi\n") + 1

    def test_logprobs(self, client):
        answer = client.chat.completions.create(
            model="fake", messages=self.MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2, temperature=0
        )
        content = answer.choices[0].logprobs.content
        assert len(content) == 4
        assert all(len(c.top_logprobs) == 2 and c.top_logprobs[0].logprob == c.logprob for c in content)
        assert (
            bytes(b for c in content for b in c.bytes).decode("utf-8", "replace") == answer.choices[0].message.content
        )

    def test_parts_of_text(self, client):
        parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
        joined = [{"role": "user", "content": "hi"}]
        texts = [
            client.chat.completions.create(model="fake", messages=m, max_tokens=5, temperature=0)
            .choices[0]
            .message.content
            for m in (parts, joined)
        ]
        assert texts[0] == texts[1]

    def test_a_schema(self, client):
        pytest.importorskip("xgrammar")
        schema = {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        }
        answer = client.chat.completions.create(
            model="fake",
            messages=self.MESSAGES,
            max_tokens=300,
            seed=3,
            temperature=0.7,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
        choice = answer.choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content)["a"], bool)
        else:  # white space without end is valid so far
            assert choice.message.content.lstrip().startswith("{")

    @pytest.mark.parametrize(
        ("extra", "param"),
        [
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
            ({"chat_template": "{{ 1 }}"}, "chat_template"),
            ({"top_logprobs": 3}, "top_logprobs"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
                "messages",
            ),
        ],
    )
    def test_what_is_not_supported_is_refused(self, raw, extra, param):
        refused = raw.post("/v1/chat/completions", json={"messages": self.MESSAGES, "max_tokens": 2} | extra)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param


class TestOthers:
    def test_models(self, client):
        models = client.models.list().data
        assert [m.id for m in models] == ["fake"]
        assert models[0].model_extra["max_model_len"] == 512

    def test_tokenize_there_and_back(self, raw):
        found = raw.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
        assert found["count"] == 3
        assert found["token_strs"][0] == "h"
        assert raw.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "hé"}

    def test_health_metrics_and_document(self, raw):
        assert raw.get("/health").json()["status"] == "ready"
        parser = pytest.importorskip("prometheus_client.parser")
        names = {f.name for f in parser.text_string_to_metric_families(raw.get("/metrics").text)}
        assert {
            "hasten_num_requests_running",
            "hasten_num_requests_waiting",
            "hasten_kv_cache_usage_perc",
            "hasten_prefix_cache_queries",
            "hasten_generation_tokens",
            "hasten_request_success",
            "hasten_time_to_first_token_seconds",
            "hasten_inter_token_latency_seconds",
            "hasten_e2e_request_latency_seconds",
        } <= names
        assert raw.get("/openapi.json").json()["openapi"].startswith("3.1")

    def test_requests_are_counted(self, raw):
        def count(name):
            lines = raw.get("/metrics").text.splitlines()
            return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"hasten_{name}"))

        before = count("request_success_total"), count("generation_tokens_total"), count("prompt_tokens_total")
        raw.post("/v1/completions", json={"prompt": "abcd", "max_tokens": 7, "ignore_eos": True})
        after = count("request_success_total"), count("generation_tokens_total"), count("prompt_tokens_total")
        assert [b - a for a, b in zip(before, after, strict=True)] == [1, 7, 4]


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"prompt": "x" * 600}, "prompt"),
            ({"prompt": "x", "max_tokens": 5000}, "max_tokens"),
            ({"prompt": "x", "temperature": -1}, "temperature"),
            ({"prompt": "x", "top_p": 0}, "top_p"),
            ({"prompt": "x", "n": 0}, "n"),
            ({"prompt": "x", "n": 3, "best_of": 2}, "best_of"),
            ({"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
            ({"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias"),
            ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
            ({"prompt": "x", "stop": [""]}, "stop"),
            ({"prompt": "x", "stop_token_ids": [5000]}, "stop_token_ids"),
            ({"prompt": "x", "slo": "ttft<banana"}, "slo"),
            ({"prompt": "x", "min_tokens": 100, "max_tokens": 5}, "min_tokens"),
            ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
            ({"prompt": [100000]}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": []}, "prompt"),
            ({"prompt": "x", "suffix": "y", "echo": True}, "echo"),
            ({"prompt": ["x"], "suffix": "y"}, "suffix"),
            ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format"),
            ({"prompt": "x", "n": 128, "best_of": 128, "priority": "high"}, "priority"),
            ({}, "prompt"),
        ],
    )
    def test_a_bad_field_is_named(self, raw, body, param):
        refused = raw.post("/v1/completions", json=body)
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"].split(".")[0] == param
        assert error["message"]

    def test_the_context_is_named_with_its_own_code(self, client):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="fake", prompt="x" * 600)
        assert caught.value.code == "context_length_exceeded"
        assert "512" in str(caught.value)

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000])
    def test_a_body_that_is_no_request(self, raw, body):
        refused = raw.post("/v1/completions", content=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["type"] == "invalid_request_error"

    def test_paths_methods_models_and_sizes(self, raw, client):
        assert raw.get("/v1/nothing").status_code == 404
        wrong = raw.get("/v1/completions")
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "POST"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="another", prompt="x")
        assert raw.post("/v1/completions", content=b" " * (9 << 20)).status_code == 413

    def test_the_key(self, start_fake):
        server = start_fake(api_key="sesame", metrics_prefix="vllm:", served_name="mine", chat=False)
        with httpx.Client(base_url=server.url, timeout=20) as raw:
            assert raw.get("/health").status_code == 200
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}):
                refused = raw.get("/v1/models", headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
            good = {"authorization": "Bearer sesame"}
            assert raw.get("/v1/models", headers=good).json()["data"][0]["id"] == "mine"
            assert "\nvllm:num_requests_running{" in raw.get("/metrics").text
            chat = raw.post("/v1/chat/completions", headers=good, json={"messages": [{"role": "user", "content": "x"}]})
            assert chat.status_code == 400
            assert "no chat template" in chat.json()["error"]["message"]


def test_it_listens_on_this_machine_only(server):
    psutil = pytest.importorskip("psutil")
    listening = [c for c in psutil.Process(server.process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert [c.laddr.ip for c in listening] == ["127.0.0.1"]


def test_small_writes_are_not_held_back():
    """asyncio sets TCP_NODELAY only where the socket names its protocol; without it a token may wait 40 ms."""
    import socket

    from hasten.serve.server import ServerConfig, _listen

    listener = _listen(ServerConfig(port=0))
    assert listener.proto == socket.IPPROTO_TCP
    listener.close()
