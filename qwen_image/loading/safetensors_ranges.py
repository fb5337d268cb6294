"""Safetensors files by their headers and byte ranges: what is in them is known before a weight is read, and a part of a
tensor is read without the rest.

    stored = read_headers(files)                        # {name: StoredTensor}; a truncated file is an error here
    with RangeReader() as reader:
        reader.read(stored["proj_out.weight"], destination)              # any device and dtype; returns at once
        reader.read(stored["img_in.weight"], half, first=1000)           # elements 1000 … of the flattened tensor
    # here all of it has arrived, or the first error is raised

Values that are NaN or infinite end the reading with an error: one would spoil every image and every gradient. float8 numbers
that come with a scale (`StoredTensor.scale`, see float8_scales.py) are multiplied with it.

Reading in parallel is what makes a disk give its full speed; a memory map (safetensors' own way) faults page by page.
Format: 8 bytes length (little endian), a JSON header, then the tensors' bytes (huggingface.co/docs/safetensors).
"""

import json
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from files.shown import shown
from qwen_image.loading.pinned_memory import host_memory

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
    """A tensor in a file: contiguous, at bytes [offset, offset + numel · itemsize).

    `name` is the file's own. `scale` (float32, one number or one a row) is what the stored numbers are multiplied with.
    """

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    offset: int
    name: str = ""
    scale: torch.Tensor | None = field(default=None, compare=False)

    @property
    def numel(self) -> int:
        return self.shape.numel()


def read_headers(files: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """All tensors of `files` in the order in which they lie there, single-file prefixes removed; reads no weights.

    Raises ValueError for a file that is no safetensors file, is truncated, or holds a type that torch has not, and for a
    tensor that two files hold.
    """
    found: dict[str, StoredTensor] = {}
    for path in files:
        for name, stored in _read_header(path).items():
            if name in found:
                raise ValueError(
                    f"{shown(found[name].path)} and {shown(path)} both hold {shown(name)}: they are not parts of one model"
                )
            found[name] = stored
    return found


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
                    path,
                    DTYPES[entry["dtype"]],
                    torch.Size(entry["shape"]),
                    8 + length + entry["data_offsets"][0],
                    name,
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
    return next((p for p in _SINGLE_FILE_PREFIXES if any(name.startswith(p) for name in names)), "")


def _unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is no readable safetensors file ({reason}); download it again")


def _not_finite(stored: StoredTensor) -> ValueError:
    return ValueError(
        f"{shown(stored.path)}: {shown(stored.name)} has values that are NaN or infinite: download it again, or take another "
        "model"
    )


def _scales_of(stored: StoredTensor, first: int, count: int) -> torch.Tensor:
    """Of the flattened tensor's elements [first, first + count): one number, or as many as elements."""
    assert stored.scale is not None
    if stored.scale.numel() == 1:
        return stored.scale.reshape(())
    columns = stored.numel // stored.scale.numel()
    rows = stored.scale.flatten()[first // columns : (first + count - 1) // columns + 1]
    return rows.repeat_interleave(columns)[first % columns : first % columns + count]


def read_whole(stored: StoredTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor on the CPU, in its own dtype or another. Raises ValueError for a file that ends too early or holds NaN."""
    values = torch.empty(stored.shape, dtype=dtype or stored.dtype)
    with RangeReader() as reader:
        reader.read(stored, values)
    return values


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
        self._looked_at: list[
            tuple[StoredTensor, torch.Tensor]
        ] = []  # on a GPU: read at the end, so that nothing waits
        hidden = None if progress else True  # None: in a log file, where it can't stay in place
        self._bar = tqdm(
            desc="loading weights", total=total, unit="B", unit_scale=True, disable=hidden, mininterval=0.5
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
        in_place = part.device.type == "cpu" and part.dtype == stored.dtype and stored.scale is None
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
        if stored.scale is not None:
            part.mul_(_scales_of(stored, first, part.numel()).to(part.device))
        self._look(stored, part)
        self._bar.update(size)

    def _look(self, stored: StoredTensor, part: torch.Tensor) -> None:
        """Raise ValueError, now (on the CPU) or at the end, unless all of `part` is finite. Costs less than the copy did."""
        if not part.is_floating_point() or part.element_size() == 1:
            return
        if part.is_cuda:
            self._looked_at.append((stored, torch.stack(torch.aminmax(part)).isfinite().all()))
        elif not torch.linalg.vector_norm(part).isfinite() and not part.isfinite().all():  # the norm alone may overflow
            raise _not_finite(stored)

    def _staging(self, pinned: bool) -> torch.Tensor:
        """This thread's buffer; pinned for a GPU, or the copy would go through another one."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = host_memory((CHUNK_BYTES,), torch.uint8, pinned)
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
            for stored, finite in self._looked_at if kind is None else ():
                if not finite:
                    raise _not_finite(stored)
        finally:
            self._pool.shutdown(wait=True)
            for descriptor in self._files.values():
                os.close(descriptor)
            self._bar.close()
