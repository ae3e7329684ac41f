"""Pieces of code for the model to complete and to infill, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from hasten.language.generate import Answer
    from hasten.language.loading import LanguageModel

__all__ = ["PIECES", "Piece", "show"]


@dataclass(frozen=True)
class Piece:
    """A place in a program."""

    title: str
    prefix: str
    suffix: str | None = None
    """what follows; None asks for a completion"""
    max_tokens: int = 48


PIECES = (
    Piece(
        "complete a method",
        '''class Queue:
    """A first-in, first-out queue."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self._items = []

    def __len__(self):
        return''',
        max_tokens=40,
    ),
    Piece(
        "complete a parser",
        """import argparse


def main():
    parser = argparse.ArgumentParser(description="Count the lines of a file.")
    parser.add_argument(""",
        max_tokens=40,
    ),
    Piece(
        "infill an argument",
        """import os


def read_all(path):
    with open(""",
        """) as file:
        return file.read()
""",
        max_tokens=16,
    ),
    Piece(
        "infill a body",
        """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        """,
        """

    def pop(self):
        return self.items.pop()
""",
        max_tokens=24,
    ),
)


def show(console: Console, model: LanguageModel) -> list[tuple[Piece, Answer]]:
    """Answer every piece on the screen; what the model wrote is coloured."""
    from rich.panel import Panel
    from rich.text import Text

    answers = []
    for piece in PIECES:
        if piece.suffix is None:
            answer = model.generate(piece.prefix, max_tokens=piece.max_tokens)
        else:
            answer = model.infill(piece.prefix, piece.suffix, max_tokens=piece.max_tokens)
        answers.append((piece, answer))
        text = Text(piece.prefix, style="dim")
        text.append(answer.text, style="bold green")
        text.append(piece.suffix or "", style="dim")
        rate = f"{answer.rate:,.0f} tokens/s after it" if len(answer.times) > 1 else "one token"
        first = f"first token after {answer.ttft * 1e3:.1f} ms" if answer.times else "no token: the model ended at once"
        console.print(Panel(text, title=piece.title, subtitle=f"{first}, {rate}", title_align="left", expand=False))
    return answers
