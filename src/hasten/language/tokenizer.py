"""Text to tokens and back, from the files of a Hugging Face folder.

``tokenizer.json`` does the work (through the ``tokenizers`` package); the configs beside it say which tokens end an
answer, whether a text begins with one, and how a chat is written. :class:`Detokenizer` turns a stream of tokens into a
stream of text that never holds half a character; the pieces joined equal the text decoded at once.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import InvalidRequestError, ModelLoadError
from hasten.language.infill import FimTokens, infill_prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["Detokenizer", "FimTokens", "NoTokenizer", "StopStrings", "Tokenizer"]

_FIM_SPELLINGS = (
    # prefix, suffix, middle: as published models write them
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)
_FIM_FIELDS = (
    ("fim_prefix_token", "fim_suffix_token", "fim_middle_token"),
    ("prefix_token", "suffix_token", "middle_token"),
)


def _byte_alphabet() -> dict[str, int]:
    """The letters that byte-level vocabularies write their 256 bytes with (GPT-2's table): letter -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)})
    return table


class Tokenizer:
    """A text's tokens, from the state of one ``tokenizer.json`` and the configs beside it.

    ``Tokenizer.from_folder(path)`` reads a model folder. ``state()`` is plain data that makes the same tokenizer in
    another process. Reading is thread-safe; nothing that can be seen changes after construction.
    """

    def __init__(self, tokenizer_json: str, config: Mapping[str, Any] | None = None) -> None:
        """``config`` holds the fields of tokenizer_config.json, and ``eos_token_ids`` where they are known from
        elsewhere.

        Raises :class:`~hasten.errors.ModelLoadError` if the text is not a tokenizer.
        """
        self._json = tokenizer_json
        self._backend: Backend | None = None
        self._table: tuple[list[bytes] | None] | None = None  # in a tuple, since None says something
        self.config: dict[str, Any] = dict(config or {})
        self.vocab_size: int = self.backend.get_vocab_size(with_added_tokens=True)
        added = self.backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content for i, token in added.items()}
        self.bos_token_id = self._token_id("bos_token")
        self.eos_token_ids: tuple[int, ...] = tuple(self.config.get("eos_token_ids") or ())
        if not self.eos_token_ids:
            eos = self._token_id("eos_token")
            self.eos_token_ids = () if eos is None else (eos,)
        self.fim_tokens = self._find_fim_tokens()
        self.chat_template: str | None = self._read_template()
        _ = self.token_bytes

    @property
    def backend(self) -> Backend:
        """The tokenizer of the ``tokenizers`` package, with neither truncation nor padding."""
        backend = self._backend
        if backend is None:
            from tokenizers import Tokenizer as Backend

            try:
                backend = Backend.from_str(self._json)
            except Exception as error:  # the package raises plain Exception
                raise ModelLoadError(
                    f"tokenizer.json cannot be read ({error}); copy it again from the model's source"
                ) from error
            backend.no_truncation()
            backend.no_padding()
            self._backend = backend
        return backend

    def forget(self) -> None:
        """Give back the memory of the vocabulary; it is read again from the text when it is needed."""
        self._backend = self._table = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` and the configs of a model folder.

        Raises :class:`~hasten.errors.ModelLoadError` if there is no tokenizer.json or one of the files is broken.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelLoadError(f"{folder} holds no tokenizer.json; a model folder needs it beside config.json")
        config = _read_json(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        for name in ("generation_config.json", "config.json"):  # the first that names end tokens wins
            eos = _read_json(folder / name).get("eos_token_id")
            if eos is not None:
                config["eos_token_ids"] = [eos] if isinstance(eos, int) else list(eos)
                break
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelLoadError(
                f"{path} is not UTF-8 text ({error}); copy it again from the model's source"
            ) from error
        return cls(text, config)

    def state(self) -> tuple[str, dict[str, Any]]:
        """Plain data; ``Tokenizer(*state)`` is the same tokenizer."""
        return self._json, self.config

    def _token_id(self, field: str) -> int | None:
        value = self.config.get(field)
        if isinstance(value, Mapping):
            value = value.get("content")
        return self.backend.token_to_id(value) if isinstance(value, str) else None

    def _find_fim_tokens(self) -> FimTokens | None:
        found: list[list[int | None]] = []
        for fields in _FIM_FIELDS:
            found.append([self._token_id(name) for name in fields])
        found += [[self.backend.token_to_id(token) for token in spelling] for spelling in _FIM_SPELLINGS]
        for prefix, suffix, middle in found:
            if prefix is not None and suffix is not None and middle is not None:
                return FimTokens(prefix, suffix, middle, end=self.eos_token_ids[0] if self.eos_token_ids else middle)
        return None

    def _read_template(self) -> str | None:
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several named ones
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def _byte_table(self, data: dict[str, Any]) -> list[bytes] | None:
        """Bytes of every token where the vocabulary is byte-level, else None."""
        decoder = data.get("decoder") or {}
        parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
        if [part.get("type") for part in parts] != ["ByteLevel"]:
            return None
        alphabet = _byte_alphabet()
        table = [b""] * self.vocab_size
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index >= len(table):
                return None
            if index in self._added:
                table[index] = token.encode()
            elif all(letter in alphabet for letter in token):
                table[index] = bytes(alphabet[letter] for letter in token)
            else:
                table[index] = token.encode()
        return table

    @property
    def token_bytes(self) -> list[bytes] | None:
        """Bytes of every token of a byte-level vocabulary, by id; None for other kinds."""
        held = self._table
        if held is None:
            held = self._table = (self._byte_table(json.loads(self._json)),)
        return held[0]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of ``text``; ``special`` adds what the model's texts begin (or end) with."""
        return list(self.backend.encode(_clean(text), add_special_tokens=special).ids)

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Tokens of several texts."""
        return [list(e.ids) for e in self.backend.encode_batch([_clean(t) for t in texts], add_special_tokens=special)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ``ids``; bytes that are no character become U+FFFD. Unknown ids are left out."""
        table = self.token_bytes
        if table is not None:
            size, hidden = len(table), self.special_ids if skip_special else ()
            return b"".join(table[i] for i in ids if 0 <= i < size and i not in hidden).decode("utf-8", "replace")
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def token_text(self, index: int) -> str:
        """One token as text, for lists of logprobs; half characters become U+FFFD."""
        if index in self._added:
            return self._added[index]
        if self.token_bytes is not None:
            return self.decode([index])
        token = self.backend.id_to_token(index)
        return "" if token is None else str(self.backend.decode([index])) or str(token)

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """A fresh incremental decoder."""
        return Detokenizer(self, skip_special=skip_special)

    def infill(self, prefix: str, suffix: str) -> list[int]:
        """The prompt that asks for the text between ``prefix`` and ``suffix`` (prefix, suffix, middle order).

        Raises :class:`~hasten.errors.InvalidRequestError` if the model has no tokens for it.
        """
        return self.infill_within(prefix, suffix)[0]

    def infill_within(
        self, prefix: str, suffix: str, *, context: int | None = None, max_tokens: int = 0
    ) -> tuple[list[int], int]:
        """The same prompt cut to ``context`` tokens with the answer, and how many tokens were left out."""
        if self.fim_tokens is None:
            raise InvalidRequestError(
                "suffix was given, but this model has no infilling tokens (such as <|fim_prefix|>); leave suffix out, "
                "or use a model trained to infill",
                "suffix",
            )
        head = [self.bos_token_id] if self.bos_token_id is not None and self.config.get("add_bos_token") else []
        return infill_prompt(
            lambda text: self.encode(text, special=False),
            prefix,
            suffix,
            self.fim_tokens,
            head=head,
            context=context,
            max_tokens=max_tokens,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **extra: object,
    ) -> list[int]:
        """Tokens of a chat, written by the model's own template. Raises ``InvalidRequestError`` if it has none."""
        from hasten.language.chat import render

        template = template or self.chat_template
        if template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions or give the server one with --chat-template",
                "messages",
            )
        text = render(
            template, messages, add_generation_prompt=add_generation_prompt, tokens=self._template_tokens(), extra=extra
        )
        return self.encode(text, special=False)

    def _template_tokens(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = self.config.get(name)
            value = value.get("content") if isinstance(value, Mapping) else value
            found[name] = value if isinstance(value, str) else ""
        return found


class NoTokenizer(Tokenizer):
    """Stands in where a model has random weights and no vocabulary: token ids in, numbers out.

    >>> NoTokenizer(1000).decode([5, 17])
    ' 5 17'
    """

    def __init__(self, vocab_size: int) -> None:
        self.config = {}
        self.vocab_size = vocab_size
        self.special_ids = frozenset()
        self.bos_token_id = None
        self.eos_token_ids = ()
        self.fim_tokens = None
        self.chat_template = None
        self._table = (None,)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        raise InvalidRequestError("this model has no tokenizer; give the prompt as token ids", "prompt")

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        raise InvalidRequestError("this model has no tokenizer; give the prompt as token ids", "prompt")

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return "".join(f" {int(i)}" for i in ids)

    def token_text(self, index: int) -> str:
        return f" {index}"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not JSON ({error}); copy it again from the model's source") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} holds a {type(data).__name__}; a JSON object was expected")
    return data


def _clean(text: str) -> str:
    """Lone surrogates are no text; they become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text


class Detokenizer:
    """Tokens in, text out, one step at a time; a character is held back until it is whole.

    Byte-level vocabularies go through an incremental UTF-8 decoder. Others are decoded with a little context, since
    there the text of a token can depend on the one before (the two-offset method of text-generation-inference).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden: Iterable[int] = tokenizer.special_ids if skip_special else ()
        self._skip = skip_special
        self._table = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._context = 0
        self._read = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now."""
        table = self._table
        if table is not None:
            hidden, size = self._hidden, len(table)
            return self._utf8.decode(b"".join([table[i] for i in ids if 0 <= i < size and i not in hidden]))
        pieces = []
        for index in ids:
            self._ids.append(index)
            pieces.append(self._advance(final=False))
        return "".join(pieces)

    def flush(self) -> str:
        """What was held back; half characters become U+FFFD."""
        if self._table is not None:
            return self._utf8.decode(b"", final=True)
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        decode = self._tokenizer.decode
        before = decode(self._ids[self._context : self._read], skip_special=self._skip)
        now = decode(self._ids[self._context :], skip_special=self._skip)
        if not final and (len(now) <= len(before) or now.endswith("�")):
            return ""
        new = now[len(before) :]
        self._context, self._read = self._read, len(self._ids)
        if self._context > 4096:  # keep the list short
            del self._ids[: self._context]
            self._read -= self._context
            self._context = 0
        return new


class StopStrings:
    """Finds stop strings in a stream of text, across the borders of its pieces.

    Text that could be the beginning of a stop string is held back. After a hit nothing more comes out.

    >>> watch = StopStrings(["END"])
    >>> watch.push("one E"), watch.push("N"), watch.push("D two"), watch.stopped
    ('one ', '', '', 'END')
    """

    def __init__(self, stops: Iterable[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.stopped: str | None = None
        """the stop string that was found"""

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        if not self._stops:
            return text
        if self.stopped is not None:
            return ""
        text = self._held + text
        self._held = ""
        hits = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, _, stop = min(hits)
            self.stopped = stop
            return text[: at + len(stop)] if self._include else text[:at]
        keep = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), keep, -1):
                if text.endswith(stop[:size]):
                    keep = size
                    break
        if keep:
            self._held = text[-keep:]
            return text[:-keep]
        return text

    def flush(self) -> str:
        """What was held back, when the text is over."""
        held, self._held = self._held, ""
        return held if self.stopped is None else ""
