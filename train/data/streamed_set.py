"""What `--loader webdataset` knows of its data: a manifest where there is one, else a look at the first samples.

    dataset = StreamedSet("pipe:cat photos-{000..099}.tar", say=print)
    StreamLoader(dataset.urls, …)

There is no index: no samples can be read by number, held out, or put into an order.
"""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch

from data_prep.shard_format.shards import EMPTY_PROMPT, MANIFEST, Bucket, Manifest, read_manifest
from train.data.remote_shards import Remote, is_remote, write_whole
from train.data.shard_dataset import ShardDataset
from train.data.webdataset_stream import image_size

LOOK = 64  # samples that are looked at where there is no manifest


class StreamedSet(ShardDataset):
    """The attributes of a ShardDataset that hold without an index.

    Args:
        data: a folder of shards, here or remote, or what webdataset takes (`pipe:…`, braces, a URL of one tar).
        cache_folder: where manifest and empty prompt of a remote folder are copied to.

    Raises FileNotFoundError, or ValueError for encoded shards without the manifest that says what encoded them.
    """

    def __init__(self, data: str, max_prompt_tokens: int, say: Callable[[str], None], cache_folder: Path) -> None:
        self.max_prompt_tokens = max_prompt_tokens
        self.urls: list[str] | str = data
        listed = not data.startswith("pipe:") and "{" not in data and not data.endswith(".tar")
        self.folder = Path(data)
        if listed and is_remote(data):
            self.folder = copy_facts(data, cache_folder.expanduser())
        if listed and (self.folder / MANIFEST).is_file():
            self.manifest = read_manifest(self.folder)
            self.urls = [f"{data.rstrip('/')}/{shard.name}" for shard in self.manifest.shards]
        else:
            if listed:
                self.urls = [str(path) for path in sorted(self.folder.glob("*.tar"))]
            self.manifest = look(self.urls)
            largest = self.manifest.buckets[0]
            say(
                f"{data} has no {MANIFEST}: the memory plan takes {largest.width}×{largest.height}, the largest of its "
                f"first {LOOK} images, for the largest of all"
            )
        self.encoded = self.manifest.payload == "safetensors"
        self.empty_prompt = None
        if self.encoded:
            if not (self.folder / EMPTY_PROMPT).is_file():
                raise FileNotFoundError(f"{data} has no {EMPTY_PROMPT}: run encode_shards.py again")
            self.empty_prompt = safetensors.torch.load_file(self.folder / EMPTY_PROMPT)["prompt_embeds"]
        self.validation = self.training = np.array([], dtype=np.int64)
        self.index: Any = SimpleNamespace(prompt_tokens=np.array([max_prompt_tokens]))  # the longest there may be

    def __len__(self) -> int:
        return int(self.manifest.totals.get("samples", 0))


def copy_facts(url: str, cache_folder: Path) -> Path:
    """Copy a remote folder's manifest and empty prompt into a folder of their own, which is returned."""
    folder = cache_folder / f"stream-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    remote = Remote(url)
    try:
        write_whole(folder / MANIFEST, [remote.read(MANIFEST)])
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} holds no {MANIFEST}; for plain shards give their URLs, with braces") from None
    try:
        write_whole(folder / EMPTY_PROMPT, [remote.read(EMPTY_PROMPT)])
    except FileNotFoundError:
        pass  # image shards have none
    return folder


def look(urls: list[str] | str) -> Manifest:
    """A manifest made of the first samples: the kind of payload and one bucket of the largest width and height."""
    import webdataset

    width = height = 0
    for raw in itertools.islice(webdataset.WebDataset(urls, shardshuffle=False), LOOK):
        if "safetensors" in raw:
            raise ValueError(
                f"{raw['__url__']} holds encoded samples, but no {MANIFEST} says for which model: give the folder that "
                "encode_shards.py wrote"
            )
        size = image_size(next(raw[suffix] for suffix in ("jpg", "jpeg", "png") if suffix in raw))
        width, height = max(width, size[0]), max(height, size[1])
    if not width:
        raise ValueError(f"{urls} holds no samples")
    fingerprint = hashlib.sha256(repr(urls).encode()).hexdigest()
    return Manifest("jpg", fingerprint, {}, [Bucket(0, width, height, 0)], {}, [], {})
