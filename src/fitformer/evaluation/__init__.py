"""What a trained model is worth on held-out data; every measurement is a pair of name and value.

`run.evaluate(run)` chooses by the run's task; the other modules of this room know no runs.
"""
