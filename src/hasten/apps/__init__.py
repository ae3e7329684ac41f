"""Whole programs on top of the library."""
