"""Masked diffusion on LLaMA: the bidirectional control."""
