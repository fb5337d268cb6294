"""Safetensors files by their headers and byte ranges: what is in them is known before a weight is read, and a part of a
tensor is read without the rest.

    stored = read_headers(files)                        # {name: StoredTensor}; a truncated file is an error here
    with RangeReader() as reader:
        reader.read(stored["proj_out.weight"], destination)              # any device and dtype; returns at once
        reader.read(stored["img_in.weight"], half, first=1000)           # elements 1000 … of the flattened tensor
    # here all of it has arrived, or the first error is raised

Reading in parallel is what makes a disk give its full speed; a memory map (safetensors' own way) faults page by page.
Format: 8 bytes length (little endian), a JSON header, then the tensors' bytes (huggingface.co/docs/safetensors).
"""

import json
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from files.shown import shown

CHUNK_BYTES = 16 << 20  # read at once by one thread
THREADS = 4
LONGEST_HEADER = 100_000_000  # the format's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Single-file checkpoints put the transformer under one of these (ComfyUI, original releases).
_SINGLE_FILE_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: contiguous, at bytes [offset, offset + numel · itemsize)."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    offset: int

    @property
    def numel(self) -> int:
        return self.shape.numel()


def read_headers(files: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """All tensors of `files` in the order in which they lie there, single-file prefixes removed; reads no weights.

    Raises ValueError for a file that is no safetensors file, is truncated, or holds a type that torch has not.
    """
    return {name: stored for path in files for name, stored in _read_header(path).items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise _unreadable(path, "no header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            tensors = {
                name: StoredTensor(
                    path, DTYPES[entry["dtype"]], torch.Size(entry["shape"]), 8 + length + entry["data_offsets"][0]
                )
                for name, entry in entries
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(path, f"header: {type(error).__name__} {shown(error)}") from error
    for name, tensor in tensors.items():
        start, end = header[name]["data_offsets"]
        if end - start != tensor.numel * tensor.dtype.itemsize:
            raise _unreadable(path, f"{shown(name)} has {end - start} bytes, its shape says otherwise")
        if 8 + length + end > size:
            raise _unreadable(path, f"it has {size:,} bytes and should have {8 + length + end:,}")
    prefix = single_file_prefix(list(tensors))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def single_file_prefix(names: list[str]) -> str:
    """What stands before the transformer's own names in a single-file checkpoint, or nothing."""
    return next((prefix for prefix in _SINGLE_FILE_PREFIXES if names and names[0].startswith(prefix)), "")


def _unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is no readable safetensors file ({reason}); download it again")


class RangeReader:
    """Fills tensors from files with several threads. Memory: CHUNK_BYTES a thread, none where bytes need no conversion.

    Args:
        progress: a bar over `total` bytes.
    """

    def __init__(self, progress: bool = False, total: int | None = None, threads: int = THREADS) -> None:
        from tqdm import tqdm

        self._pool = ThreadPoolExecutor(threads)
        self._futures: list[Future[None]] = []
        self._files: dict[Path, int] = {}
        self._local = threading.local()
        self._stop = threading.Event()
        self._bar = tqdm(
            desc="loading weights", total=total, unit="B", unit_scale=True, disable=not progress, mininterval=0.5
        )

    def read(self, stored: StoredTensor, destination: torch.Tensor, first: int = 0) -> list[Future[None]]:
        """Fill `destination` (contiguous) with the flattened tensor's elements from `first` on, cast to its dtype.

        It is full when all that is returned is done; the end of the `with` block waits for everything.
        """
        assert destination.is_contiguous() and first + destination.numel() <= stored.numel
        if stored.path not in self._files:
            self._files[stored.path] = os.open(stored.path, os.O_RDONLY)
        flat = destination.detach().view(-1)
        chunk = CHUNK_BYTES // stored.dtype.itemsize
        parts = [(start, flat[start : start + chunk]) for start in range(0, flat.numel(), chunk)]
        futures = [self._pool.submit(self._read, stored, first + start, part) for start, part in parts]
        self._futures += futures
        return futures

    def _read(self, stored: StoredTensor, first: int, part: torch.Tensor) -> None:
        if self._stop.is_set():
            return
        size = part.numel() * stored.dtype.itemsize
        in_place = part.device.type == "cpu" and part.dtype == stored.dtype
        buffer = part.view(torch.uint8) if in_place else self._staging(part.is_cuda)[:size]
        view = buffer.numpy().data
        done = 0
        while done < size:
            place = stored.offset + first * stored.dtype.itemsize + done
            count = os.preadv(self._files[stored.path], [view[done:]], place)
            if count == 0:
                raise _unreadable(stored.path, f"it ends at byte {place:,}")
            done += count
        if not in_place:
            part.copy_(buffer.view(stored.dtype))  # waits for the device: the buffer is used again
        self._bar.update(size)

    def _staging(self, pinned: bool) -> torch.Tensor:
        """This thread's buffer; pinned for a GPU, or the copy would go through another one."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned)
        return self._local.buffer

    def __enter__(self) -> "RangeReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
        try:
            for future in self._futures:
                try:
                    future.result()
                except BaseException:
                    self._stop.set()  # the chunks that are still waiting are not worth reading
                    if kind is None:
                        raise
        finally:
            self._pool.shutdown(wait=True)
            for descriptor in self._files.values():
                os.close(descriptor)
            self._bar.close()
