"""The simulator: a whole cluster of production code on one virtual clock, with everything around it modelled.

What is real: the coordinator's and the worker's loops, cores, log, election, journal, uploads, restores, the etcd
client, and everything they import. What is modelled is what an operating system and a network would give them:
the clock, threads, processes, sockets, etcd, the object store, the disks, the trainers. Production code is not
changed for it and does not know of it; `surroundings.py` puts the models where the operating system was.

    python -m tests.sim --seeds 10000          many fresh schedules
    python -m tests.sim --seed 7 --trace       one of them again, told line by line
"""
