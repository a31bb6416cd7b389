"""The wire between coordinator, workers and clients: agent.proto and the code generated from it (`make proto`)."""
