"""The trial: hostile and damaged files, interrupts, kills and loops, as many as fit into some minutes.

`python -m trials --minutes 60` prints a table; `python -m trials --repeat KIND:SEED:NUMBER` repeats one try.
"""
