"""Decoupled RoPE on LLaMA: the single-stream control (second paper)."""
