"""Everything that runs the suite on one machine: places, files, processes, first data."""
