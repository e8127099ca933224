"""What a run will cost, before it starts: memory, time, money, from a configuration and a model's config.json alone.

`Job` says what is computed, `cost` what that takes on a `Hardware`. One training step runs on tensors that have shapes
but no values (`trace.py`), on a model cut to one layer of each sort, and is scaled to the whole depth (`grow.py`).
"""
