"""Measurements of a trained model on held-out data; each is a pair of name and value.

`evaluate.evaluate(run)` measures a run by its task; the other modules know no runs.
"""
