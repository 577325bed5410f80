"""The console script `a3`.

It is a module beside the package because importing `a3_hf` registers its models with transformers, which imports torch and
takes about 5 s. If this module is loaded first, `a3_hf` puts that off until a command runs, so that help, the version and
errors on the command line come at once.
"""


def main() -> None:
    from a3_hf.cli import app

    app()
