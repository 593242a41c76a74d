"""What an operator runs on a GPU machine: what is there, the engine's contract, its throughput."""
