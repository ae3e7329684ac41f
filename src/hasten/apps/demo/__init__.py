"""The main job, from end to end: a model, its cost, an SLO, a tuned server, and the proof.

``run`` takes the embedded model (or any other), completes and infills code, measures the model on this machine, chooses
an SLO that the untuned server misses at an offered load, tunes the server for it, replays one workload against the
untuned and the tuned server over a socket, and writes both columns and a plain verdict into one HTML page.
"""

from hasten.apps.demo.run import DemoResult, run

__all__ = ["DemoResult", "run"]
