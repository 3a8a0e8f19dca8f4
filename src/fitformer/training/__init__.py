"""Training a recipe into a run directory: `fit.train`. Nothing heavy is imported here."""
