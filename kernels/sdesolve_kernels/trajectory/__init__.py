"""Whole trajectories in one kernel, generated from a step written in torch."""
