"""Rows of metrics whose numbers come from the device later."""

import pytest
import torch

from train.watching.late_row import LateRow


def test_what_goes_in_comes_out_in_order():
    norm = torch.tensor([2.5], requires_grad=True)  # of any shape with one element
    row = LateRow.of(7, loss=torch.tensor(0.1, dtype=torch.float64), lr=1e-4, grad_norm=norm, epoch=0.3)
    assert row.step == 7 and list(row.read().items()) == [
        ("loss", 0.1),
        ("lr", 1e-4),
        ("grad_norm", 2.5),
        ("epoch", 0.3),
    ]


def test_numbers_are_those_of_their_time():
    """What the device adds up afterwards in the same tensor belongs to the next row."""
    total = torch.tensor(1.0)
    row = LateRow.of(1, loss=total)
    total += 1
    assert row.read() == {"loss": 1.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to wait for")
def test_only_reading_waits_for_the_gpu():
    total = torch.tensor(1.5, device="cuda")
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
    assert row.read() == {"loss": 3.0, "lr": 1e-4}
