"""Likelihoods of data by the instantaneous change of variables, trace estimators, and quantised data."""
