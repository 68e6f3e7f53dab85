"""Dashboards and rules as code: `make generate` writes what the chart ships (helm/moe-asr/dashboards and rules)."""
