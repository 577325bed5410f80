"""Experiments: grids of complete runs, each trained, measured, tabled and plotted."""
