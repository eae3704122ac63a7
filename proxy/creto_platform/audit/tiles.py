"""C2SP tlog-tiles on disk: where tiles and entry bundles are, how they are read, and the unfinished right edge.

    checkpoint                      the signed head
    tile/<L>/<N>[.p/<W>]            256 (or W) hashes of level 8 * L
    tile/entries/<N>[.p/<W>]        256 (or W) entries, each after its length as big-endian uint16

N is written in groups of three digits, all but the last with an ``x`` before it. Source: c2sp.org/tlog-tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from creto_hotpath.leaves import bundle
from creto_platform.audit.merkle import EMPTY_ROOT, leaf_hashes, node_hash, perfect_root
from creto_platform.audit.port import LogTampered

WIDTH = 256
HASH_BYTES = 32
# A level-0 tile and its bundle are needed together for each page of a proof or a tail; this keeps about 1 MiB.
_CACHED_TILES = 128


def tile_path(level: int | str, number: int, width: int = WIDTH) -> str:
    """Path of a tile below the log directory; ``level`` "entries" names a bundle."""
    groups = [f"{number % 1000:03d}"]
    while number >= 1000:
        number //= 1000
        groups.insert(0, f"x{number % 1000:03d}")
    path = "/".join(["tile", str(level), *groups])
    return path if width == WIDTH else f"{path}.p/{width}"


def parse_tile_path(path: str) -> tuple[int, int]:
    """Level and number of a full hash tile's path, as ``tile_path`` writes it."""
    _, level, *groups = path.split("/")
    return int(level), int("".join(group.removeprefix("x") for group in groups))


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    """Entries, each after its length (uint16, big-endian)."""
    return bundle(entries)


def decode_bundle(data: bytes, width: int) -> list[bytes]:
    """Exactly ``width`` entries. Raises LogTampered("corrupt")."""
    entries: list[bytes] = []
    at = 0
    while at < len(data) and len(entries) < width:
        size = int.from_bytes(data[at : at + 2], "big")
        at += 2
        entries.append(data[at : at + size])
        if len(data) - at < size:
            raise LogTampered("corrupt", "an entry bundle ends within an entry")
        at += size
    if len(entries) != width or at != len(data):
        raise LogTampered("corrupt", f"an entry bundle does not hold exactly {width} entries")
    return entries


class TileStore:
    """Reads tiles and bundles of a log directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._full_tile = lru_cache(_CACHED_TILES)(self._read_full_tile)

    def checkpoint(self) -> bytes | None:
        """The signed note, None when there is none yet."""
        try:
            return (self._directory / "checkpoint").read_bytes()
        except FileNotFoundError:
            return None

    def hashes(self, level: int, number: int, width: int) -> list[bytes]:
        """The first ``width`` hashes of a tile. Raises LogTampered naming the file."""
        data, found = (self._full_tile(level, number), WIDTH) if width == WIDTH else self._read(level, number, width)
        if len(data) != found * HASH_BYTES:
            raise LogTampered("corrupt", f"{tile_path(level, number, found)} does not hold {found} hashes")
        return [data[at : at + HASH_BYTES] for at in range(0, width * HASH_BYTES, HASH_BYTES)]

    def entries(self, number: int, width: int) -> list[bytes]:
        """The first ``width`` entries of a bundle. Raises LogTampered naming the file."""
        data, found = self._read("entries", number, width)
        try:
            return decode_bundle(data, found)[:width]
        except LogTampered as error:
            raise LogTampered("corrupt", f"{tile_path('entries', number, found)}: {error.detail}") from None

    def _read_full_tile(self, level: int, number: int) -> bytes:
        return self._read(level, number, WIDTH)[0]

    def _read(self, level: int | str, number: int, width: int) -> tuple[bytes, int]:
        """Content and the width it was stored with: a full tile stands in for a partial one that was pruned."""
        for candidate in (width, WIDTH):
            try:
                return (self._directory / tile_path(level, number, candidate)).read_bytes(), candidate
            except FileNotFoundError:
                continue
        raise LogTampered("rollback", f"{self._directory / tile_path(level, number, width)} is missing")


class TreeReader:
    """Hashes of perfect subtrees of the tree over the first ``size`` entries, from its tiles."""

    def __init__(self, store: TileStore, size: int) -> None:
        self._store = store
        self.size = size

    def node(self, level: int, index: int) -> bytes:
        """See ``merkle.Node``."""
        tile_level, height = divmod(level, 8)
        number, start = divmod(index << height, WIDTH)
        width = min(WIDTH, (self.size >> (8 * tile_level)) - number * WIDTH)
        hashes = self._store.hashes(tile_level, number, width)
        return perfect_root(hashes[start : start + (1 << height)])

    def entry(self, index: int) -> bytes:
        """The bytes of one entry."""
        number, place = divmod(index, WIDTH)
        return self._store.entries(number, min(WIDTH, self.size - number * WIDTH))[place]


@dataclass(slots=True)
class RightEdge:
    """The unfinished tiles of a tree and its unfinished bundle: all that is needed to append.

    hashes: per tile level, fewer than 256 hashes. bundle: the entries of the unfinished bundle.
    """

    size: int = 0
    hashes: list[list[bytes]] = field(default_factory=list)
    bundle: list[bytes] = field(default_factory=list)

    @classmethod
    def load(cls, store: TileStore, size: int) -> RightEdge:
        """The edge of the tree of that size. Raises LogTampered when a tile is missing or damaged."""
        edge = cls(size)
        remaining, level = size, 0
        while remaining:
            number, width = divmod(remaining, WIDTH)
            edge.hashes.append(store.hashes(level, number, width) if width else [])
            remaining, level = number, level + 1
        if size % WIDTH:
            edge.bundle = store.entries(size // WIDTH, size % WIDTH)
            if leaf_hashes(edge.bundle) != edge.hashes[0]:
                raise LogTampered(
                    "corrupt", f"{tile_path('entries', size // WIDTH, size % WIDTH)} is not what was signed"
                )
        return edge

    def copy(self) -> RightEdge:
        return RightEdge(self.size, [list(level) for level in self.hashes], list(self.bundle))

    def extend(self, entries: Sequence[bytes]) -> dict[str, bytes]:
        """Appends entries; the files (path -> content) that the larger tree needs beyond the old one's.

        None of them belongs to the old tree: a published file is never written again, so a crash cannot tear it.
        Memory: the new files. Time: one hash per entry and 1/256 more above.
        """
        files: dict[str, bytes] = {}
        old_size = self.size
        at = 0
        while at < len(entries):
            part = entries[at : at + WIDTH - len(self.bundle)]
            at += len(part)
            self.bundle += part
            self.size += len(part)
            self._push(0, leaf_hashes(part), files)
            if len(self.bundle) == WIDTH:
                files[tile_path("entries", self.size // WIDTH - 1)] = encode_bundle(self.bundle)
                self.bundle = []
        if self.bundle and entries:
            files[tile_path("entries", self.size // WIDTH, len(self.bundle))] = encode_bundle(self.bundle)
        for level, data in self.partial_tiles().items():
            if self.size >> (8 * level) != old_size >> (8 * level):
                files[self._partial_path(level)] = data
        return files

    def partial_tiles(self) -> dict[int, bytes]:
        """The unfinished tiles, by level."""
        return {level: b"".join(hashes) for level, hashes in enumerate(self.hashes) if hashes}

    def _partial_path(self, level: int) -> str:
        return tile_path(level, self.size >> (8 * (level + 1)), len(self.hashes[level]))

    def root(self) -> bytes:
        """RFC 6962 root of the whole tree."""
        peaks = [peak for hashes in reversed(self.hashes) for peak in _peaks(hashes)]
        if not peaks:
            return EMPTY_ROOT
        computed = peaks.pop()
        while peaks:
            computed = node_hash(peaks.pop(), computed)
        return computed

    def _push(self, level: int, digests: list[bytes], files: dict[str, bytes]) -> None:
        """Adds no more than end a tile; ``size`` counts them already."""
        if level == len(self.hashes):
            self.hashes.append([])
        hashes = self.hashes[level]
        hashes += digests
        if len(hashes) == WIDTH:
            files[tile_path(level, (self.size >> (8 * (level + 1))) - 1)] = b"".join(hashes)
            self.hashes[level] = []
            self._push(level + 1, [perfect_root(hashes)], files)


def _peaks(hashes: Sequence[bytes]) -> list[bytes]:
    """Roots of the perfect subtrees that ``hashes`` splits into, largest first."""
    peaks, at = [], 0
    while at < len(hashes):
        width = 1 << ((len(hashes) - at).bit_length() - 1)
        peaks.append(perfect_root(hashes[at : at + width]))
        at += width
    return peaks
