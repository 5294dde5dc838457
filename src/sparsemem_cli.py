"""What the console script runs. It stands beside the package, whose own import loads torch and peft.

While this module is loaded, `import sparsemem` loads neither: each command does when it needs a model.
"""


def main() -> None:
    from sparsemem.cli.main import main

    main()
