import json
from importlib.metadata import version

import pytest

from a3_hf.evaluation.reporting.results import environment, read_results, write_result

HARNESS = {"results": {"toy": {"acc,none": 0.5}}, "configs": {"toy": {}}, "config": {"model": "hf"}}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_what_is_written_is_read(tmp_path):
    rows = [{"order": "random", "loss": 1.5}, {"order": "café", "loss": float("nan")}]
    write_result(tmp_path / "deep" / "er" / "one.json", "ppl", {"seed": 3}, rows, device="cpu")
    (read,) = read_results(tmp_path)
    assert (read["kind"], read["config"], read["path"]) == ("ppl", {"seed": 3}, "deep/er/one.json")
    assert read["rows"][0] == rows[0]
    assert read["rows"][1]["order"] == "café" and read["rows"][1]["loss"] != read["rows"][1]["loss"]
    assert read["versions"] == environment("cpu")["versions"] and read["versions"]["torch"] == version("torch")
    assert read["device"].startswith("CPU")
    assert len(read["date"]) == 10


def test_both_forms_in_the_order_of_their_paths_and_nothing_else(tmp_path):
    write(tmp_path / "b" / "results_1.json", HARNESS)
    write(tmp_path / "a.json", {"kind": "ppl", "rows": []})
    write(tmp_path / "c.json", {"rows": [], "torch": "2"})
    write(tmp_path / "d.json", [1, 2])
    write(tmp_path / "e.json", {"results": {}})
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "samples.jsonl").write_text("{}\n{")
    assert [result["path"] for result in read_results(tmp_path)] == ["a.json", "b/results_1.json"]


def test_no_folder_and_no_result(tmp_path):
    with pytest.raises(ValueError, match=r"folder='.*nowhere': no such folder"):
        read_results(tmp_path / "nowhere")
    write(tmp_path / "other.json", {"a": 1})
    with pytest.raises(ValueError, match="expected a folder with results of `a3 eval`"):
        read_results(tmp_path)


@pytest.mark.parametrize("content", [b'{"kind": "ppl", "rows": [', b"\xff\xfe{}", b""])
def test_a_file_that_is_cut_off_is_named(tmp_path, content):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json can't be read"):
        read_results(tmp_path)


@pytest.mark.parametrize("rows", [None, {"a": 1}, [1]])
def test_a_measurement_without_rows_is_named(tmp_path, rows):
    write(tmp_path / "empty.json", {"kind": "needle", "rows": rows})
    with pytest.raises(ValueError, match=r"empty\.json has kind='needle' but no list of `rows`"):
        read_results(tmp_path)


def test_scores_without_a_config_are_named(tmp_path):
    write(tmp_path / "bare.json", {**HARNESS, "config": None})
    with pytest.raises(ValueError, match=r"bare\.json has `results` but no `config`"):
        read_results(tmp_path)
