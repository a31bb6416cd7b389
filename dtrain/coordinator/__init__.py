"""The coordinator: owns every global decision of every job.

``core`` decides (pure), ``log`` remembers (etcd), ``election`` makes one leader, ``loop`` joins them,
``rpc`` talks to workers and people, ``effects`` performs the I/O that the coordinator itself owes.
"""
