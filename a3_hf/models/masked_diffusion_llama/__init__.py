"""Masked diffusion on LLaMA: a bidirectional model, as a control."""
