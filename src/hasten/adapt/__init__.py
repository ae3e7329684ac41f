"""Decisions per input at run time."""
