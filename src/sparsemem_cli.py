"""The entry point of the console script `sparsemem`.

It is outside the package because importing the package loads torch and peft. While this module is loaded,
`import sparsemem` loads neither; each command imports them when it needs a model.
"""


def main() -> None:
    from sparsemem.cli.main import main

    main()
