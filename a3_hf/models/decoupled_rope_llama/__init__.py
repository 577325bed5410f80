"""Decoupled RoPE on LLaMA: a single-stream any-order model, as a control (second paper)."""
