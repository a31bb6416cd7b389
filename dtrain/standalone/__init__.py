"""A whole cluster on one machine: embedded etcd, a coordinator and workers as supervised processes."""
