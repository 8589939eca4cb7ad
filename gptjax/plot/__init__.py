"""Plots: the metrics of runs, and figures for notebooks."""
