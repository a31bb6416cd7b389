"""Writing memory to a file past the page cache: the disk takes the bytes from where they lie.

The processor copies none of them, so an upload takes little of it from what trains meanwhile, and the files that others
have cached stay cached. Only whole blocks can go this way, and only if they begin at a multiple of the block in memory
and in the file alike, on a file system that can do it. What cannot is left to the caller.
"""

import fcntl
import os

from dtrain.storage.metering import Meter

BLOCK_BYTES = 4096  # what the strictest of the usual disks and file systems ask for
CHUNK_BYTES = 32 * 1024 * 1024  # written at a time: between two the disk waits for a thread that yields to training


def write_direct(descriptor: int, memory: memoryview, position: int, meter: Meter) -> int:
    """Write as much of ``memory``, which begins at a page, to ``position`` as goes this way; return how many bytes.

    They are on the disk, but the file's size and the place of its blocks are not before an fsync.
    """
    direct = getattr(os, "O_DIRECT", 0)
    whole = len(memory) // BLOCK_BYTES * BLOCK_BYTES
    if not direct or not whole or position % BLOCK_BYTES:
        return 0
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    done = 0
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct)
        while done < whole and not done % BLOCK_BYTES:
            chunk = memory[done : min(done + CHUNK_BYTES, whole)]
            meter.before(len(chunk))
            count = os.pwrite(descriptor, chunk, position + done)
            done += count
            meter.moved(count)
    except OSError:
        pass  # it cannot, whatever the file system calls that; or the disk fails, and will say so again
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return done
