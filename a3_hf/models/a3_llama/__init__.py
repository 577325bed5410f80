"""A3 on LLaMA. Imports torch, transformers and this folder only: a saved checkpoint carries these files."""
