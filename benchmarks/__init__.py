"""What is fast, and what recovers: each module is run with `python -m` and writes raw results to docs/results."""
