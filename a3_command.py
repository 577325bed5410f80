"""The console script `a3`.

It stands beside the package, not in it: importing anything of `a3_hf` registers its models with transformers, which takes
torch, transformers and some 5 s. `a3_hf` leaves that until a command runs where this module was loaded first, so that help,
the version and a mistyped option are answered at once.
"""


def main() -> None:
    from a3_hf.cli import app

    app()
