"""`python -m sparsemem`: the command line."""

from .cli.main import main

main(prog_name="python -m sparsemem")
