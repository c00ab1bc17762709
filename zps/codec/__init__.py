"""How gradients and weights are encoded for their journey: what to choose, and what it takes.

One file per codec; `registry.codec(name)` finds them, `spec.Compression` reads what a person wrote,
`plan.Plan` lays encoded pieces out. The arithmetic is in csrc/codec.
"""
