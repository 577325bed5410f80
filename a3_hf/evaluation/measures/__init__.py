"""Measures beyond lm-eval's tasks, for `a3 eval` and for experiments."""
