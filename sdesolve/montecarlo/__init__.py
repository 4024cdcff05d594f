"""Expectations of what an SDE ends at, with standard errors."""
