"""Benchmarks: one file per question, `peers/` for what is compared, one shared harness."""
