"""Images that were there before: by the same bytes, or by perceptual hashes that differ in few bits."""

from __future__ import annotations

MODES = ("none", "exact", "perceptual")
HASH_BITS = 64


class Duplicates:
    """Remembers digests and the paths they came with; the first of equals is the one that is kept."""

    def __init__(self, mode: str, distance: int = 4) -> None:
        """`distance`: how many of the 64 bits of two perceptual hashes may differ (ImageHash's phash)."""
        if not 0 <= distance < HASH_BITS // 2:
            raise ValueError(
                f"--duplicate_distance {distance}: must be from 0 to {HASH_BITS // 2 - 1} bits of {HASH_BITS}"
            )
        assert mode in MODES, mode
        self.mode, self.distance = mode, distance
        self._exact: dict[str, str] = {}
        self._hashes: list[tuple[int, str]] = []
        # Hashes that differ in at most d bits agree in one of d + 1 bands: only those are compared.
        self._bands: list[dict[int, list[int]]] = [{} for _ in range(distance + 1)]

    def find(self, digest: str, path: str) -> str | None:
        """Path of an earlier image that this one repeats; else None, and this one is remembered."""
        if self.mode == "none":
            return None
        if self.mode == "exact":
            first = self._exact.setdefault(digest, path)
            return None if first == path else first
        value = int(digest, 16)
        bands = [self._band(value, number) for number in range(len(self._bands))]
        for table, band in zip(self._bands, bands, strict=True):
            for position in table.get(band, ()):
                earlier, path_of_earlier = self._hashes[position]
                if (earlier ^ value).bit_count() <= self.distance:
                    return path_of_earlier
        for table, band in zip(self._bands, bands, strict=True):
            table.setdefault(band, []).append(len(self._hashes))
        self._hashes.append((value, path))
        return None

    def _band(self, value: int, number: int) -> int:
        low = HASH_BITS * number // len(self._bands)
        high = HASH_BITS * (number + 1) // len(self._bands)
        return value >> low & ((1 << high - low) - 1)
