"""`python -m vlmprune` is the command `vlmprune`; torchrun needs it."""

from vlmprune.cli import main

main()
