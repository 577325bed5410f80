"""`python -m a3_hf`, which launchers such as `accelerate launch -m` call, is `a3`."""

from .cli import app

if __name__ == "__main__":
    app()
