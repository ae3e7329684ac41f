"""Round trips, streams that never hold half a character, stop strings, infilling marks."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from hasten.errors import InvalidRequestError, ModelLoadError
from hasten.language.tokenizer import NoTokenizer, StopStrings, Tokenizer

MARKS = [
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
]


def byte_level(special=("<|endoftext|>",), **config):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("Ġ", "a"), ("Ã", "©")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return Tokenizer(backend.to_str(), {"eos_token": special[0], **config})


def byte_fallback():
    """As Llama's: spaces as ▁, unknown characters as bytes, the first space stripped."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for b in range(256):
        vocab[f"<0x{b:02X}>"] = len(vocab)
    for letter in "▁abcdehlo":
        vocab[letter] = len(vocab)
    vocab["▁a"] = len(vocab)
    backend = Backend(
        models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return Tokenizer(backend.to_str(), {"eos_token": "</s>", "bos_token": "<s>"})


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def tokenizer(request):
    return byte_level() if request.param == "byte-level" else byte_fallback()


@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_text_survives_the_way_there_and_back(tokenizer, text):
    text = text.replace("▁", "_")  # sentencepiece writes spaces so
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_joined_equal_the_whole(tokenizer, data):
    """Any tokens, valid UTF-8 or not, cut anywhere.

    Byte-fallback decoders are spared broken UTF-8: the package marks a whole run of bytes as bad when one of them is,
    which no stream can know beforehand.
    """
    top = tokenizer.vocab_size - 1
    token = st.integers(0, top)
    if tokenizer.token_bytes is None:
        token = token.filter(lambda i: not 3 <= i < 259)
    ids = data.draw(st.lists(token, max_size=24))
    stream = tokenizer.detokenizer(skip_special=True)
    pieces, at = [], 0
    while at < len(ids):
        step = data.draw(st.integers(1, 4))
        pieces.append(stream.push(ids[at : at + step]))
        at += step
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=True)


@given(text=st.text(alphabet="aé漢😀 ", max_size=20))
@settings(max_examples=100, deadline=None)
def test_no_piece_holds_half_a_character(tokenizer, text):
    stream = tokenizer.detokenizer()
    pieces = [stream.push([i]) for i in tokenizer.encode(text, special=False)]
    assert all("\ufffd" not in p for p in pieces)
    assert "".join(pieces) + stream.flush() == text


def test_byte_level_decoding_equals_the_package(tmp_path):
    tokenizer = byte_level()
    for text in ("héllo a", "😀 漢字", "\x00\n\t", "<|endoftext|>x"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b"), skip_special=True) == "ab"


def test_state_makes_the_same_tokenizer():
    one = byte_level(eos_token_ids=[3, 4])
    two = Tokenizer(*one.state())
    assert two.encode("hello") == one.encode("hello")
    assert two.eos_token_ids == (3, 4)


def test_lone_surrogates_do_not_break_encoding(tokenizer):
    assert isinstance(tokenizer.encode("a\ud800b"), list)


@pytest.mark.parametrize("marks", MARKS)
@given(prefix=st.text(max_size=12), suffix=st.text(max_size=12))
@settings(max_examples=25, deadline=None)
def test_infilling_marks_are_found_by_their_spelling(marks, prefix, suffix):
    tokenizer = byte_level(("<|endoftext|>", *marks))
    fim = tokenizer.fim_tokens
    assert (fim.prefix, fim.suffix, fim.middle) == tuple(tokenizer.backend.token_to_id(m) for m in marks)
    ids = tokenizer.infill(prefix, suffix)
    at = ids.index(fim.suffix)
    assert ids[0] == fim.prefix
    assert ids[-1] == fim.middle
    if not any(m in prefix + suffix for m in (*marks, "<|endoftext|>")):
        assert tokenizer.decode(ids[1:at]) == prefix
        assert tokenizer.decode(ids[at + 1 : -1]) == suffix


def test_infilling_marks_named_in_the_config_win():
    names = ("<a>", "<b>", "<c>")
    fields = dict(zip(("fim_prefix_token", "fim_suffix_token", "fim_middle_token"), names, strict=True))
    tokenizer = byte_level(("<|endoftext|>", *names, *MARKS[0]), **fields)
    assert tokenizer.fim_tokens.middle == tokenizer.backend.token_to_id("<c>")


def test_a_model_without_marks_refuses_a_suffix():
    with pytest.raises(InvalidRequestError, match="infilling") as caught:
        byte_level().infill("a", "b")
    assert caught.value.param == "suffix"


class TestFolders:
    def write(self, folder, **files):
        (folder / "tokenizer.json").write_text(byte_level().state()[0])
        for name, value in files.items():
            (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
        return folder

    def test_end_tokens_come_from_generation_config_first(self, tmp_path):
        folder = self.write(tmp_path, generation_config={"eos_token_id": [5, 6]}, config={"eos_token_id": 7})
        assert Tokenizer.from_folder(folder).eos_token_ids == (5, 6)

    def test_then_from_config(self, tmp_path):
        assert Tokenizer.from_folder(self.write(tmp_path, config={"eos_token_id": 7})).eos_token_ids == (7,)

    def test_a_template_file_is_read(self, tmp_path):
        (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
        tokenizer = Tokenizer.from_folder(self.write(tmp_path))
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "hé"}])
        assert tokenizer.decode(ids) == "hé"

    def test_no_template_is_said_plainly(self, tmp_path):
        with pytest.raises(InvalidRequestError, match="no chat template"):
            Tokenizer.from_folder(self.write(tmp_path)).apply_chat_template([])

    def test_a_missing_tokenizer_is_said_plainly(self, tmp_path):
        with pytest.raises(ModelLoadError, match="no tokenizer.json"):
            Tokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}', "[]"])
    def test_a_broken_tokenizer_is_said_plainly(self, tmp_path, text):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ModelLoadError, match="cannot be read"):
            Tokenizer.from_folder(tmp_path)

    def test_a_broken_config_is_said_plainly(self, tmp_path):
        with pytest.raises(ModelLoadError, match="not JSON"):
            Tokenizer.from_folder(self.write(tmp_path, tokenizer_config="{"))


def test_no_tokenizer_writes_numbers():
    tokenizer = NoTokenizer(100)
    stream = tokenizer.detokenizer()
    assert stream.push([1]) + stream.push([23]) + stream.flush() == " 1 23"
    with pytest.raises(InvalidRequestError, match="token ids"):
        tokenizer.encode("x")


def slow_stop(text, stops, include):
    """Where the first stop string begins, the longest of those that begin there."""
    hits = [(text.find(s), -len(s), s) for s in stops if s in text]
    if not hits:
        return text, None
    at, _, stop = min(hits)
    return text[:at] + (stop if include else ""), stop


@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=10),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=3), min_size=1, max_size=3, unique=True),
    include=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_are_found_across_pieces(pieces, stops, include):
    watch = StopStrings(stops, include=include)
    out = ""
    seen = ""
    for piece in pieces:
        out += watch.push(piece)
        seen += piece
        if watch.stopped:
            break
    out += watch.flush()
    found = any(s in seen for s in stops)
    assert (watch.stopped is not None) == found
    if not found:
        assert out == seen
    elif include:
        assert out.endswith(watch.stopped)
        assert seen.startswith(out)
    else:
        assert seen.startswith(out + watch.stopped)
        assert not any(s in out for s in stops)


def test_stop_strings_in_one_piece_follow_the_definition():
    for text in ("xxabcabx", "ab", "cab"):
        watch = StopStrings(["ab", "abc"])
        assert (watch.push(text) + watch.flush(), watch.stopped) == slow_stop(text, ["ab", "abc"], False)


def test_a_vocabulary_that_was_forgotten_is_read_again(tmp_path):
    from hasten.language.loading import model_folder

    tokenizer = Tokenizer.from_folder(model_folder("pycode-4m"))
    text = "def f(x): return 'ä'"
    ids, table = tokenizer.encode(text), tokenizer.token_bytes
    tokenizer.forget()
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes == table
    assert tokenizer.encode(text) == ids
