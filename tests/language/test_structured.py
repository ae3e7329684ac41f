"""Random logits under a grammar still give conforming text."""

import json
import sys

import pytest
import torch

from hasten.errors import InvalidRequestError, MissingExtraError
from hasten.language.params import GrammarSpec
from hasten.language.structured import GrammarCompiler
from hasten.language.tokenizer import Tokenizer

torch.set_num_threads(1)


def tokenizer():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend.to_str(), {"eos_token": "<|endoftext|>"})


@pytest.fixture(scope="module")
def compiler():
    pytest.importorskip("xgrammar")
    return GrammarCompiler(tokenizer(), vocab_size=264)


def write(compiler, spec, seed, limit=400):
    """The text that random logits give under a grammar, or None where it did not end in time."""
    words = tokenizer()
    state = compiler.start(spec)
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    while not state.done and len(tokens) < limit:
        logits = torch.randn(264, generator=generator)
        logits[256] += 3  # the end is likely where it is allowed
        logits[ord('"') - 33] += 3  # and so is the end of a string
        state.mask(logits)
        token = int(logits.argmax())
        assert logits[token] > -torch.inf
        tokens.append(token)
        state.accept(token)
    return words.decode(tokens, skip_special=True) if state.done else None


@pytest.mark.parametrize("seed", range(4))
def test_json_schema(compiler, seed):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    text = write(compiler, GrammarSpec("json_schema", json.dumps(schema)), seed)
    if text is None:
        pytest.skip("white space went on for ever with this seed")
    value = json.loads(text)
    assert isinstance(value["ok"], bool)
    assert value["kind"] in ("a", "b")


@pytest.mark.parametrize("seed", range(4))
def test_regex_and_grammar(compiler, seed):
    assert write(compiler, GrammarSpec("regex", "[0-9]{3}-[xy]"), seed)[3] == "-"
    assert write(compiler, GrammarSpec("grammar", 'root ::= "yes" | "no"'), seed) in ("yes", "no")


def test_a_json_object_is_an_object(compiler):
    state = compiler.start(GrammarSpec("json_object"))
    logits = torch.zeros(264)
    state.mask(logits)
    allowed = tokenizer().decode((logits == 0).nonzero()[:, 0].tolist())
    assert "{" in allowed
    assert "[" not in allowed


@pytest.mark.parametrize(
    "spec",
    [
        GrammarSpec("regex", "[0-9"),
        GrammarSpec("json_schema", "{"),
        GrammarSpec("json_schema", '{"type": "banana"}'),
        GrammarSpec("grammar", "root = nonsense"),
    ],
)
def test_broken_specifications_are_the_requests_fault(compiler, spec):
    with pytest.raises(InvalidRequestError, match="cannot be compiled"):
        compiler.start(spec)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(MissingExtraError, match=r"hasten\[grammar\]"):
        GrammarCompiler(tokenizer(), vocab_size=264)
