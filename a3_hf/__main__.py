"""`python -m a3_hf`: the command `a3` for launchers such as `accelerate launch -m`."""

from .cli import app

if __name__ == "__main__":
    app()
