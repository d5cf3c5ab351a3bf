"""Around the launcher: what looks after a run from outside its ranks, what tells a rank that its launcher is gone, and
what looks at nodes before a run.

Nothing in here imports torch or deepspeed at its top, as a supervisor starts fast and lives long; of the package it
imports config alone.
"""
