"""The wire between coordinator, workers and clients: agent.proto and the code generated from it (`make proto`)."""

# Of one message, whoever sends it: what one side may send, the other must take, or the stream ends at each try anew.
# A snapshot of a node, or the status of a cluster with thousands of ranks, has some MiB; gRPC's own limit is 4 MiB.
MESSAGE_MAX_BYTES = 64 << 20
