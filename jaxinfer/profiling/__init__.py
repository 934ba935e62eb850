"""Where a step's time goes, op by op, beside what this device can do.

`ceilings` measures the device, `steps` runs the engine's own programs alone, `trace` records their
kernels, and `report`, which is pure, makes a table of kernels and work. `measure` puts them
together; `engine_times` times the engine from outside, `weights` says how matrices are stored.
"""
