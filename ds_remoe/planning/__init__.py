"""What a run needs before it has a cluster: memory per rank, bytes on the wire, step time, as formulas.

`plan` puts the parts together, `report` and `picture` show them, `check` sets them against a training step of this
machine. Nothing here starts a process group, but for `check`.
"""
