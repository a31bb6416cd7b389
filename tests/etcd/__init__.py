"""Tests of the room that speaks to etcd, against real servers."""
