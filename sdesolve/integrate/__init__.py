"""`solve` and what is between it and a solver's step: lowering, executors, saving, checks."""
