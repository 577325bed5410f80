"""Evaluation: lm-eval models and tasks, further measures, reports. Needs the extra `eval`."""
