"""The reading processes: they end with the loader, also those that wait for a server which never answers."""

import time

import torch
from torch.utils.data import DataLoader, Dataset

from train.loader.worker_loader import leave_signals_to_the_parent, shut_down


class Hangs(Dataset):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        if index > 2:
            time.sleep(3600)
        return torch.zeros(1)


def test_readers_that_hang_are_gone_in_seconds():
    """Torch waits ten seconds for each, one after the other: a launcher would kill the rank meanwhile."""
    batches = iter(DataLoader(Hangs(), batch_size=None, num_workers=2, worker_init_fn=leave_signals_to_the_parent))
    workers = list(batches._workers)
    next(batches)
    began = time.monotonic()
    shut_down(batches)
    assert time.monotonic() - began < 8
    for worker in workers:
        worker.join(5)
    assert not any(worker.is_alive() for worker in workers)
    shut_down(batches)  # again, at the exit
