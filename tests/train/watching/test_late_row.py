"""Rows of metrics whose numbers come from the device later."""

import pytest
import torch

from train.watching.late_row import LateRow


class Log:
    def __init__(self):
        self.rows = []

    def log(self, step, **values):
        self.rows.append((step, values))


def test_what_goes_in_comes_out_in_order():
    log = Log()
    norm = torch.tensor([2.5], requires_grad=True)  # of any shape with one element
    LateRow.of(7, loss=torch.tensor(0.1, dtype=torch.float64), lr=1e-4, grad_norm=norm, epoch=0.3).write(log)
    assert log.rows == [(7, {"loss": 0.1, "lr": 1e-4, "grad_norm": 2.5, "epoch": 0.3})]
    assert list(log.rows[0][1]) == ["loss", "lr", "grad_norm", "epoch"]


def test_numbers_are_those_of_their_time():
    """What the device adds up afterwards in the same tensor belongs to the next row."""
    log, total = Log(), torch.tensor(1.0)
    row = LateRow.of(1, loss=total)
    total += 1
    row.write(log)
    assert log.rows == [(1, {"loss": 1.0})]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to wait for")
def test_only_writing_waits_for_the_gpu():
    log, total = Log(), torch.tensor(1.5, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)
        total *= 2
        row = LateRow.of(3, loss=total, lr=1e-4)
        assert row.arrived is not None and not row.arrived.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    total += 1
    row.write(log)
    assert log.rows == [(3, {"loss": 3.0, "lr": 1e-4})]
