"""Every field fuzzed against the published document: answers conform to it and nothing is the server's fault."""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks as openapi  # noqa: E402

from hasten.serve.http.openapi import document  # noqa: E402

CHECKS = (
    not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
)
EXAMPLES = int(os.environ.get("HASTEN_FUZZ", "60"))
OPERATIONS = [(path, method) for path, item in document()["paths"].items() for method in item]


@pytest.fixture(scope="module")
def fuzzed(start_fake):
    server = start_fake(max_num_seqs=16, max_queue=256)
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=[f"{m}-{p}" for p, m in OPERATIONS])
def test_no_request_is_the_servers_fault(fuzzed, path, method):
    operation = fuzzed[path][method]
    statuses = set()
    modes = [GenerationMode.POSITIVE] + ([GenerationMode.NEGATIVE] if method == "post" else [])

    @given(st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
    @settings(
        max_examples=EXAMPLES if method == "post" else 2,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def fuzz(case):
        response = case.call(timeout=20)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    fuzz()
    if method == "post":
        assert 400 in statuses
