"""Experiments: grids of complete runs, which are trained, measured and reported in tables and plots."""
