"""What a node keeps on its disk of a checkpoint that it had to fetch: the files of one folder.

``<data folder>/cache/<job>/<attempt>-<hex of the manifest's digest>/`` holds the manifest and the indexes as they lie
in storage. For each shard of which something was fetched it holds a file laid out as the shard's image, with holes
for what was not, and a record of the ranges that are there, so that nobody reads a hole.

Nothing in it is trusted. The manifest and the indexes count only with the digests that the log and the manifest say,
each piece only with the one that its index says. A record that is wrong, a file that is cut short, bytes that a loss
of power left as zeros or that the disk damaged: each of these is as if the piece were not there.

Files are synced all the same, part by part: many file systems make a small synced write, such as the journal's, wait
for all that was written before it, and the agent acts on nothing that its journal does not hold.
"""

import mmap
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dtrain.common.digests import blob_digest
from dtrain.storage.indexes import Piece, piece_is_sound
from dtrain.storage.ranges import Span, joined_spans
from dtrain.storage.restore_files import SHARD_FILE, PartOfImage
from dtrain.worker.core.states import RestoreSource
from dtrain.worker.rank_dirs import write_whole

RECORD_FILE = "rank-{:05d}.ranges.json"
PART_BYTES = 16 * 1024 * 1024  # written between two syncs: what another's synced write may have to wait for
ATTEMPT_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Pieces of one shard as a restore brought them from storage, each verified."""

    page: mmap.mmap  # laid out as the image
    pieces: frozenset[Piece]

    def copy(self, pieces: Iterable[Piece], image: memoryview) -> set[Piece]:
        """Copy those of ``pieces`` that are here to their places; return those that arrived sound."""
        here = self.pieces.intersection(pieces)
        with memoryview(self.page) as page:
            for piece in here:
                image[piece.begin : piece.end] = page[piece.begin : piece.end]
        return {piece for piece in here if piece_is_sound(piece, image[piece.begin : piece.end])}


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """What there is of one checkpoint. Written by one thread, read by any."""

    path: Path

    # ---- reading -----------------------------------------------------------------------------------------

    def text(self, name: str, digest: str) -> bytes | None:
        """Return the small file ``name`` if its bytes have this digest."""
        try:
            data = (self.path / name).read_bytes()
        except OSError:
            return None
        return data if blob_digest(data) == digest else None

    def part(self, shard: int) -> PartOfImage:
        """Return what there probably is of this shard."""
        try:
            record = (self.path / RECORD_FILE.format(shard)).read_bytes()
            spans = msgspec.json.decode(record, type=list[Span])
        except (OSError, msgspec.DecodeError):
            spans = []
        return PartOfImage(path=str(self.path / SHARD_FILE.format(shard)), spans=spans)

    def copy(self, shard: int, pieces: Iterable[Piece], image: memoryview) -> set[Piece]:
        """Read those of ``pieces`` that are here to their places; return those that are sound."""
        part = self.part(shard)
        here = [piece for piece in pieces if part.holds(piece)]
        sound: set[Piece] = set()
        if not here:
            return sound
        try:
            file = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return sound
        try:
            for piece in here:
                target = image[piece.begin : piece.end]
                if _filled(file, target, piece.begin) and piece_is_sound(piece, target):
                    sound.add(piece)
        except OSError:
            pass  # a bad place of the disk: storage has it
        finally:
            os.close(file)
        return sound

    # ---- writing -----------------------------------------------------------------------------------------

    def missing_bytes(self, shards: Mapping[int, Fetched]) -> int:
        """Return how much room it takes to keep these as well."""
        return sum(
            piece.end - piece.begin
            for number, fetched in shards.items()
            for part in (self.part(number),)
            for piece in fetched.pieces
            if not part.holds(piece)
        )

    def put_texts(self, texts: Mapping[str, bytes]) -> None:
        """Keep the small files. Raises OSError."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, data in texts.items():
            if self.text(name, blob_digest(data)) is None:
                write_whole(self.path / name, data)

    def put(self, shard: int, fetched: Fetched, stop: threading.Event) -> None:
        """Keep the pieces, over whatever is there in their places; return early if told to stop. Raises OSError."""
        part = self.part(shard)
        spans: Sequence[Span] = part.spans
        file = os.open(part.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(file).st_size < len(fetched.page):
                os.ftruncate(file, len(fetched.page))
            with memoryview(fetched.page) as page:
                for spans_of_part in _parts(fetched.pieces):
                    if stop.is_set():
                        return
                    for begin, end in spans_of_part:
                        _write(file, page[begin:end], begin)
                    os.fdatasync(file)
                    spans = joined_spans([*spans, *spans_of_part])
                    write_whole(self.path / RECORD_FILE.format(shard), msgspec.json.encode(spans))
        finally:
            os.close(file)


def folder_name(source: RestoreSource) -> str:
    """Return what the folder of this checkpoint is called: its manifest's digest stands for all that it names."""
    return f"{source.attempt:0{ATTEMPT_DIGITS}d}-{source.manifest_digest.rpartition(':')[2]}"


def attempt_of(name: str) -> int:
    """Return the attempt of the folder of this name; 0 if it is none of ours."""
    digits = name.partition("-")[0]
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def _parts(pieces: Iterable[Piece]) -> Iterable[list[Span]]:
    """Cut what the pieces take into spans, and those into parts of at most PART_BYTES."""
    part: list[Span] = []
    room = PART_BYTES
    for begin, end in joined_spans((piece.begin, piece.end) for piece in pieces):
        while begin < end:
            until = min(end, begin + room)
            part.append((begin, until))
            room -= until - begin
            begin = until
            if room == 0:
                yield part
                part, room = [], PART_BYTES
    if part:
        yield part


def _filled(file: int, target: memoryview, offset: int) -> bool:
    """Fill ``target`` from the file; return False if that ends too soon. Raises OSError."""
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def _write(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
