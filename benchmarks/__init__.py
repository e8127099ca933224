"""How fast and how small training is, measured against the floor and the peers: `python -m benchmarks --help`."""
