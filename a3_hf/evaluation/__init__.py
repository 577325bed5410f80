"""Evaluation: lm-eval models and tasks, measurements beyond tasks, reports. Needs the extra `eval`."""
