"""Which compression suits a model and a link: measured on real gradients, and advised.

`tune.tune` for programs, `capture.run` for a script's gradients, `bandwidth.measure_link` for the
link; `measure` and `cost` are pure.
"""
