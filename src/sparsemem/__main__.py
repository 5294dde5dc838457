"""Run the command line with `python -m sparsemem`."""

from .cli.main import main

main(prog_name="python -m sparsemem")
