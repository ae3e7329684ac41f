"""Code blocks of the Markdown documents, for the tests that run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"^(<!-- test: skip -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    document: str
    line: int
    language: str
    text: str
    skipped: bool

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """The fenced blocks that name a language, in their order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(
            document.relative_to(ROOT).as_posix(),
            text.count("\n", 0, m.start(2)) + 2,
            m[2],
            m[3],
            m[1] is not None,
        )
        for m in _FENCE.finditer(text)
    ]


def execute(block: Block, replace: dict[str, str] | None = None) -> None:
    """Run a Python block in a namespace of its own; a traceback names the document and the line."""
    text = block.text
    for old, new in (replace or {}).items():
        text = text.replace(old, new)
    code = compile("\n" * (block.line - 1) + text, block.document, "exec")
    exec(code, {"__name__": "__document__"})
