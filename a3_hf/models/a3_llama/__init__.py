"""A3 on LLaMA. These files are saved with every checkpoint, so they import only torch, transformers and each other."""
