"""lm-eval models `a3` and `a3_ar`."""
