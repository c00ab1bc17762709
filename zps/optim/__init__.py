"""Rules that run in the hub: hyperparameters, state names, and the kernel that applies them.

One file per rule; `registry.rule(name)` finds them. The arithmetic is in csrc/optim.
"""
