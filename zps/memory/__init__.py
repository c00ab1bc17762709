"""Shared memory: sealed segments, and what the hub and its workers lay out in them."""
