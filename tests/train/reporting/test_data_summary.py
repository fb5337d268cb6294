"""The data of a run: from its facts or the data set itself, with links to the data set's own report."""

from pathlib import Path

from tests.helpers.data_sets import write_set
from tests.helpers.run_folders import FACTS, write_run
from train.reporting.data_summary import data_summary
from train.reporting.run_record import read_run


def test_facts_of_the_start_win_and_a_command_stands_where_no_report_lies(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", samples=0, data="s3://bucket/encoded"))
    found = data_summary(run, tmp_path)
    rows = dict(found["rows"])
    assert rows["samples"] == "36, 4 of them held out" and rows["micro-batches an epoch"] == "8"
    assert [bucket["name"] for bucket in found["buckets"]] == ["64 × 64", "96 × 64"]
    assert [bucket["share"] for bucket in found["buckets"]] == ["100.0", "80.0"]
    assert found["reports"] == [] and found["command"].startswith("python data_prep/check_shards.py s3:")


def test_the_data_sets_own_report_is_found_by_its_fingerprint(tmp_path: Path) -> None:
    from data_prep import check_shards

    data = write_set(tmp_path / "my shards", payload="png")  # its fingerprint is that of FACTS
    check_shards.main([str(data), "--num_workers", "0", "--report", str(tmp_path / "a b.html")])  # not a whole set
    (tmp_path / "other.html").write_text("<p>something else</p>")
    folder = write_run(tmp_path / "runs" / "run", samples=0, data=str(data))
    found = data_summary(read_run(folder), folder)
    assert found["reports"] == [("../../a b.html", "a b.html")]
    assert FACTS["data"]["fingerprint"] == "f" * 64


def test_without_facts_the_manifest_tells(tmp_path: Path) -> None:
    data = write_set(tmp_path / "encoded")
    folder = write_run(tmp_path / "run", samples=0, data=str(data))
    (folder / "events.jsonl").unlink()
    rows = dict(data_summary(read_run(folder), folder)["rows"])
    assert (
        rows["samples"] == "12" and rows["kind"] == "latents and prompt embeddings" and rows["fingerprint"] == "f" * 12
    )
