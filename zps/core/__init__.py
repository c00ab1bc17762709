"""Pure decisions: where a parameter lies, when a bucket is applied, who takes part.

No sockets, no clocks, no memory, no threads: a test of a decision needs no process.
"""
