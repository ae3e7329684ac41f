import json

import numpy as np
import pytest
from typer.testing import CliRunner

import hasten.retrieve as hr
from hasten.cli.main import app

runner = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with vectors, queries and an index of them."""
    folder = tmp_path_factory.mktemp("cli")
    rows, queries = hr.clustered(900, 8, 40)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "queries.npy", queries)
    told = run("build", folder / "rows.npy", folder / "index", "--head-ratio", "0.12", "--json")
    assert told["rows"] == 900
    return folder


def run(*words, status=0):
    result = runner.invoke(app, ["index", *map(str, words)])
    assert result.exit_code == status, result.output
    return json.loads(result.stdout) if "--json" in words else result.stdout


def test_search(place, tmp_path):
    told = run(
        "search", place / "index", place / "queries.npy", "-k", 3, "--exact", "--output", tmp_path / "o.npz", "--json"
    )
    rows, queries = np.load(place / "rows.npy"), np.load(place / "queries.npy")
    truth = np.argsort(((queries[:, None] - rows[None]) ** 2).sum(-1), axis=1)[:, :3]
    assert told["ids"] == truth.tolist()
    np.testing.assert_array_equal(np.load(tmp_path / "o.npz")["ids"], truth)
    text = run("search", place / "index", place / "queries.npy", "-k", 3, "--exact")
    assert text.splitlines()[0].split() == [str(i) for i in truth[0]]
    one = run("search", place / "index", place / "queries.npy", "-k", 2, "--where", "[5]", "--json")
    assert one["ids"][0] == [5, -1]
    assert one["distances"][0][1] is None


def test_the_life_of_an_index(place, tmp_path):
    run("snapshot", place / "index", tmp_path / "copy")
    np.save(tmp_path / "more.npy", np.load(place / "queries.npy")[:5])
    assert run("add", tmp_path / "copy", tmp_path / "more.npy", "--json") == {"added": 5, "rows": 905}
    assert run("add", tmp_path / "copy", tmp_path / "more.npy", "--json")["rows"] == 910
    assert run("delete", tmp_path / "copy", 3, 904, 5000, "--json") == {"deleted": 2, "rows": 908}
    assert run("compact", tmp_path / "copy", "--json")["generation"] == 2
    assert run("verify", tmp_path / "copy", "--json")["good"]
    with (tmp_path / "copy" / "postings-1-0.bin").open("r+b") as file:
        file.write(b"\xff" * 64)
    assert "NOT good" in run("verify", tmp_path / "copy", status=1)
    told = run("verify", tmp_path / "copy", "--repair", "--json")
    assert told["good"]
    assert told["repair"]["corrupt"] == 1


def test_results_go_to_a_new_folder_whole(place, tmp_path):
    run("search", place / "index", place / "queries.npy", "-k", 2, "--output", tmp_path / "new" / "o.npz")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["o.npz"]
    assert np.load(tmp_path / "new" / "o.npz")["ids"].shape == (40, 2)


def test_the_truth_of_ann_benchmarks_is_taken_from_its_file(place, tmp_path):
    h5py = pytest.importorskip("h5py")
    truth = np.array(run("search", place / "index", place / "queries.npy", "-k", 5, "--exact", "--json")["ids"])
    with h5py.File(tmp_path / "set.hdf5", "w") as file:
        file["train"], file["test"] = np.load(place / "rows.npy"), np.load(place / "queries.npy")
        file["neighbors"] = truth.astype(np.int32)
    given = ["-k", 5, "--lists", "256", "--truth", tmp_path / "set.hdf5", "--json"]
    told = run("bench", place / "index", tmp_path / "set.hdf5", *given)
    assert told["points"][0]["recall"] == 1.0


def test_bench_tune_and_cost(place):
    told = run("bench", place / "index", place / "queries.npy", "--lists", "2,16", "--json")
    assert [round(p["lists"]) for p in told["points"]] == [2, 16]
    assert told["points"][0]["recall"] <= told["points"][1]["recall"]
    assert told["memory"]["total"] > 0
    assert told["machine"]["hash"]
    assert "recall" in run("bench", place / "index", place / "queries.npy", "--lists", "4")
    tuned = run("tune", place / "index", place / "queries.npy", "--recall", 0.8, "--save", "--json")
    with hr.Spann.open(place / "index", read_only=True) as index:
        assert index.options.to_json() == tuned["options"]
    assert run("cost", "1e9", "--json")["n"] == 10**9
    assert "no fit" in run("cost", "1e9")


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["build", "nowhere.npy", "x"], "not a file"),
        (["search", "nowhere", "q.npy"], "holds no index"),
        (["cost", "1e6", "-b", "3"], "1, 2 or 4"),
        (["build", "rows.npy", "x", "--ids", "nowhere.npy"], "--ids is 'nowhere.npy'"),
        (["build", "rows.npy", "x", "--ids", "text.npy"], "no .npy file"),
        (["search", "x", "rows.npy", "--where", "[1,"], "not JSON"),
    ],
)
def test_errors_are_raised_for_main(words, word, tmp_path, monkeypatch):
    from hasten.errors import HastenError

    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.eye(4, dtype=np.float32))
    (tmp_path / "text.npy").write_text("1 2 3")
    result = runner.invoke(app, ["index", *words])
    assert isinstance(result.exception, HastenError)
    assert word in str(result.exception)
