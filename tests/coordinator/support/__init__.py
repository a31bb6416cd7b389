"""What the tests of the coordinator share: a cluster in words, processes, a worker spoken by hand."""
