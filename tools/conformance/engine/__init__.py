"""The contract that every inference engine of a worker fulfils, check by check."""
