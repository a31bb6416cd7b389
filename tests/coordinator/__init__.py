"""Tests of the coordinator: the pure core by scenarios, the shells against a real etcd and real processes."""
