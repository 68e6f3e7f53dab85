"""Dashboards and rules as code: `make dashboards` writes what the chart ships (helm/moe-asr/dashboards and rules)."""
