"""A Prometheus on this machine for local runs: `make monitor`."""
