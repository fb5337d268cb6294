"""One curve wherever the frozen base lies over several ranks, and from one home and number of ranks to another by resuming."""

import json

import pytest

from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from tests.helpers.home_runs import ROOT, rows, train_all


def test_a_run_goes_on_at_another_home_and_number_of_ranks(common, tmp_path):
    """Two ranks with a share each, then one with the base on the host, then two that have it whole."""
    two = [*common, "--gradient_accumulation_steps", "1"]
    one = [*common, "--gradient_accumulation_steps", "2"]
    whole = ["--checkpoint_steps", "2"]
    assert run_ranks(2, train_all, [(two, tmp_path / "straight", "zero2", 6, *whole)]) == [0]
    assert run_ranks(2, train_all, [(two, tmp_path / "moved", "zero3", 2, *whole)]) == [0]
    moved = [(one, tmp_path / "moved", "zero3_offload", 4, *whole)]
    assert run_ranks(1, train_all, moved) == [0]
    assert run_ranks(2, train_all, [(two, tmp_path / "moved", "zero2", 6, *whole)]) == [0]
    straight, after = (dict.fromkeys(rows(tmp_path / name)) for name in ("straight", "moved"))
    trained = [row for row in straight if row[1] is not None]
    assert len(trained) == 6
    for row in trained:
        (other,) = [each for each in after if each[0] == row[0] and each[1] is not None]
        assert other[1] == pytest.approx(row[1], rel=1e-6)


def test_shares_of_a_node_and_of_hpz(common, tmp_path):
    """Four ranks: all share, pairs share (hpZ), and shares on the host; the same curve."""
    hpz = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    hpz["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(hpz))
    jobs = [(common, tmp_path / name, name, 3) for name in ("zero2", "zero3", "zero2_offload", "zero3_offload")]
    jobs.append((common, tmp_path / "hpz", str(tmp_path / "hpz"), 3))
    assert run_ranks(4, train_all, jobs) == [0] * 5
    expected = rows(tmp_path / "zero2")
    for name in ("zero3", "hpz"):
        assert rows(tmp_path / name) == expected, name
    assert rows(tmp_path / "zero3_offload") == rows(tmp_path / "zero2_offload")
