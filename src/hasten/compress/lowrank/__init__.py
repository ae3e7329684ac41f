"""Fewer numbers by decomposition: low-rank factors, pairs of matrices, low-rank branches beside few bits."""
