"""How many cores a rank may keep busy while nothing trains."""

import os


def cores_of_rank(local_world_size: int) -> int:
    """Return this rank's share of the cores that the process may run on; 1 at least.

    ``local_world_size``: ranks on this node. At a checkpoint and at a restore all of them stand still together. How
    many threads torch computes with says nothing about it: most launchers give it one, whatever the node has.
    """
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)
