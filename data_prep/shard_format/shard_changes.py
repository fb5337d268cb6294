"""Whether the shards of a folder are still those that a run began with.

A run remembers each file's size and time of change. Where one differs later, the file is compared with the manifest's sha256:
copying a data set changes its times and nothing else; flipping one byte in place changes the time as well.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.shard_format.shards import Manifest

COMPARED_BYTES = 20 * 10**9  # in a start of a run: ten to fifty seconds
THREADS = 4


def shard_states(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Name → size in bytes and time of change in nanoseconds, of each shard."""
    states = {}
    for shard in manifest.shards:
        status = (folder / shard.name).stat()
        states[shard.name] = f"{status.st_size} {status.st_mtime_ns}"
    return states


def altered_shards(
    folder: Path, manifest: Manifest, remembered: dict[str, str], say: Callable[[str], None]
) -> list[str]:
    """The shards that are not the manifest's any more, of those that have changed since they were `remembered`.

    Says what was compared, and what was too large for it. Raises OSError for a shard that can't be read.
    """
    states = shard_states(folder, manifest)
    changed = [shard for shard in manifest.shards if remembered.get(shard.name, "") != states[shard.name]]
    if not changed:
        return []
    size, what = (
        sum(shard.bytes for shard in changed),
        f"{len(changed)} of {len(states)} shards have changed since then",
    )
    if size > COMPARED_BYTES:
        say(
            f"warning: {what} ({size / 1e9:.0f} GB, too much to compare at a start): check_shards.py can tell if they differ"
        )
        return [shard.name for shard in changed if int(states[shard.name].split()[0]) != shard.bytes]
    with ThreadPoolExecutor(THREADS) as threads:
        digests = list(threads.map(lambda shard: digest(folder / shard.name), changed))
    altered = [shard.name for shard, found in zip(changed, digests, strict=True) if found != shard.sha256]
    if not altered:
        say(f"{what}, by their time; they were compared, and their bytes are the same")
    return altered


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
