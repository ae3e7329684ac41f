"""One contender of ``vector_search.py``: a process that builds or loads an index and answers commands at a pipe.

``python vector_peers.py NAME '{"data": DIR, …}'`` reads ``["command", {…}]`` lines and writes ``{"result": …}``. It
runs in whatever environment holds the peer, so it imports nothing of hasten unless it is hasten. Every timing is
single-threaded unless it says otherwise.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def anonymous():
    """Bytes of memory that belong to this process alone: mapped files are not counted."""
    with open("/proc/self/smaps_rollup") as file:
        for line in file:
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    return 0


def peak():
    """Most bytes resident so far, mapped files included."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


class Peer:
    """What all have in common; ``search(queries, k, knob)`` gives ids."""

    threads = 1

    def __init__(self, data, **options):
        self.folder = Path(data)
        self.options = options
        self.queries = np.load(self.folder / "queries.npy")
        self.truth = np.load(self.folder / "truth.npy")

    @property
    def base(self):
        return np.load(self.folder / "base.npy", mmap_mode="r")

    def as_float(self, rows):
        return np.ascontiguousarray(rows, np.float32)

    def curve(self, knobs, k=10):
        """Recall at each knob."""
        out = []
        for knob in knobs:
            ids = np.asarray(self.search(self.queries, k, knob))
            hits = (ids[:, :k, None] == self.truth[:, None, :k]).any(1).sum()
            out.append({"knob": knob, "recall": float(hits) / (len(ids) * k)})
            if out[-1]["recall"] > 0.985 and not isinstance(knob, list):
                break  # the knobs ascend: dearer ones are of no interest
        return out

    def cheapest(self, knobs, recall, k=10):
        """The quickest knob that reaches a recall; all of them with their recall and seconds per query."""
        curve = self.curve(knobs, k)
        good = [p for p in curve if p["recall"] >= recall]
        for point in good:
            point["seconds"] = min(self.batch(point["knob"], k) for _ in range(2)) / len(self.queries)
        if not good:
            return {"knob": None, "recall": max(p["recall"] for p in curve), "curve": curve}
        best = min(good, key=lambda p: p["seconds"])
        return {"knob": best["knob"], "recall": best["recall"], "curve": curve}

    def batch(self, knob, k=10):
        """Seconds of one batch."""
        begin = time.perf_counter()
        self.search(self.queries, k, knob)
        return time.perf_counter() - begin

    def single(self, knob, k=10):
        """Seconds of each query alone."""
        out = []
        for query in self.queries:
            begin = time.perf_counter()
            self.search(query[None], k, knob)
            out.append(time.perf_counter() - begin)
        return out

    def idle(self, seconds):
        """Seconds of loops that do nothing for ``seconds``: what exceeds it, the machine took."""
        out = []
        for _ in range(len(self.queries)):
            begin = time.perf_counter()
            while (spent := time.perf_counter() - begin) < seconds:
                pass
            out.append(spent)
        return out

    def build(self):
        before, begin = anonymous(), time.perf_counter()
        self.make(self.base)
        return {"seconds": time.perf_counter() - begin, "anonymous": anonymous() - before, "peak": peak()}

    def warm(self):
        """What an import takes is not the index's."""

    def load(self):
        self.warm()
        before = anonymous()
        self.read()
        self.search(self.queries[:50], 10, self.first_knob)
        return {"memory": anonymous() - before}


class Hnswlib(Peer):
    first_knob = 16

    def _new(self):
        import hnswlib

        return hnswlib.Index("l2", self.queries.shape[1])

    def make(self, base):
        self.index = self._new()
        self.index.init_index(len(base), M=16, ef_construction=self.options.get("ef_construction", 200))
        for begin in range(0, len(base), 50_000):
            self.index.add_items(self.as_float(base[begin : begin + 50_000]), num_threads=2)
        self.index.save_index(str(self.folder / "hnswlib.bin"))

    def read(self):
        self.index = self._new()
        self.index.load_index(str(self.folder / "hnswlib.bin"))
        self.queries = self.as_float(self.queries)

    def search(self, queries, k, knob):
        self.index.set_ef(knob)
        return self.index.knn_query(queries, k, num_threads=1)[0]


class Faiss(Peer):
    first_knob = 16

    def read(self):
        import faiss

        faiss.omp_set_num_threads(1)
        self.queries = self.as_float(self.queries)
        flags = faiss.IO_FLAG_MMAP if self.mapped else 0
        self.index = faiss.read_index(str(self.folder / self.file), flags)

    mapped = False


class FaissHnsw(Faiss):
    file = "faiss_hnsw.bin"

    def make(self, base):
        import faiss

        faiss.omp_set_num_threads(2)
        self.index = faiss.IndexHNSWFlat(self.queries.shape[1], 16)
        self.index.hnsw.efConstruction = 200
        self.index.add(self.as_float(base))
        faiss.write_index(self.index, str(self.folder / self.file))

    def search(self, queries, k, knob):
        self.index.hnsw.efSearch = knob
        return self.index.search(queries, k)[1]


class FaissIvf(Faiss):
    file = "faiss_ivf.bin"
    first_knob = 8

    def make(self, base):
        import faiss

        faiss.omp_set_num_threads(2)
        lists = self.options.get("lists", 2048)
        width = self.queries.shape[1]
        self.quantizer = faiss.IndexHNSWFlat(width, 16) if lists > 4096 else faiss.IndexFlatL2(width)
        self.index = faiss.IndexIVFFlat(self.quantizer, width, lists)
        rows = self.as_float(base)
        self.index.train(rows)
        self.index.add(rows)
        faiss.write_index(self.index, str(self.folder / self.file))

    def search(self, queries, k, knob):
        self.index.nprobe = knob
        return self.index.search(queries, k)[1]


class FaissIvfMapped(FaissIvf):
    mapped = True


class Usearch(Peer):
    first_knob = 16

    def _new(self):
        from usearch.index import Index

        return Index(ndim=self.queries.shape[1], metric="l2sq", dtype="f32", connectivity=16, expansion_add=128)

    def make(self, base):
        self.index = self._new()
        self.index.add(np.arange(len(base)), self.as_float(base), threads=2)
        self.index.save(str(self.folder / "usearch.bin"))

    def read(self):
        self.index = self._new()
        self.index.load(str(self.folder / "usearch.bin"))
        self.queries = self.as_float(self.queries)

    def search(self, queries, k, knob):
        self.index.expansion_search = knob
        found = self.index.search(queries, k, threads=1)
        return found.keys.reshape(len(queries), k)


class DiskAnn(Peer):
    first_knob = 16

    def make(self, base):
        import diskannpy

        place = self.folder / "diskann"
        place.mkdir(exist_ok=True)
        diskannpy.build_memory_index(
            data=self.as_float(base),
            distance_metric="l2",
            index_directory=str(place),
            complexity=100,
            graph_degree=32,
            num_threads=2,
            alpha=1.2,
            use_pq_build=False,
            num_pq_bytes=0,
            use_opq=False,
        )

    def read(self):
        import diskannpy

        self.index = diskannpy.StaticMemoryIndex(
            index_directory=str(self.folder / "diskann"), num_threads=1, initial_search_complexity=256
        )
        self.queries = self.as_float(self.queries)

    def search(self, queries, k, knob):
        return self.index.batch_search(queries, k, max(knob, k), 1).identifiers


class Hasten(Peer):
    """The library itself; a knob is [lists, beam]."""

    first_knob = (8, 24)

    def make(self, base):
        from hasten.retrieve.index.build import BuildOptions, build

        known = {"head_ratio", "replicas", "memory", "degree", "alpha", "threads"}
        options = BuildOptions(**{k: v for k, v in self.options.items() if k in known})
        self.told = build(base, self.folder / "hasten.spann", options)

    def read(self):
        from hasten.retrieve.index.spann import Spann

        more = {"io": self.options.get("io", "mmap"), "memory": self.options.get("hold")}
        self.index = Spann.open(self.folder / "hasten.spann", read_only=True, **more)

        self.known = (None, None)

    def options_of(self, knob):
        """The knobs of a search, made once as a user would."""
        if self.known[0] is not knob:
            from hasten.retrieve.index.hit import SearchOptions

            self.known = (knob, SearchOptions(lists=knob[0], beam=knob[1], epsilon=1e15))
        return self.known[1]

    def search(self, queries, k, knob):
        return self.index.search(queries, k, options=self.options_of(knob), detail=False).ids

    def details(self, knob):
        """What a query reads, and the parts of the memory."""
        hit = self.index.search(self.queries, 10, options=self.options_of(knob))
        return {**hit.stats.mean(), "parts": self.index.memory(), "built": self.index.describe()["built"]}

    def warm(self):
        import tempfile

        from hasten.retrieve.index.build import build
        from hasten.retrieve.index.spann import Spann

        with tempfile.TemporaryDirectory() as place:
            build(np.array(self.base[:3000]), Path(place) / "warm")
            with Spann.open(Path(place) / "warm", read_only=True) as index:
                index.search(self.queries[:5], 10)

    def build(self):
        """Seconds, and the peak beyond what a tiny build leaves behind (compiled kernels are not the collection's)."""
        self.warm()
        before, begin = peak(), time.perf_counter()
        self.make(self.base)
        return {"seconds": time.perf_counter() - begin, "above": peak() - before, "peak": peak(), "built": self.told}


KINDS = {
    "hnswlib": Hnswlib,
    "faiss-hnsw": FaissHnsw,
    "faiss-ivf": FaissIvf,
    "faiss-ivf-mapped": FaissIvfMapped,
    "usearch": Usearch,
    "diskann": DiskAnn,
    "hasten": Hasten,
}


def main():
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    try:
        peer = KINDS[kind](**options)
        out.write(json.dumps({"result": {}}) + "\n")
        out.flush()
        for line in sys.stdin:
            command, arguments = json.loads(line)
            out.write(json.dumps({"result": getattr(peer, command)(**arguments)}) + "\n")
            out.flush()
    except ImportError as error:
        out.write(json.dumps({"absent": f"not installed: {error}"}) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
