"""`python -m tierstore`: the same as the console script."""

from tierstore.cli import main

main()
