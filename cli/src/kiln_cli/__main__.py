"""`python -m kiln_cli`: the kiln command where its script is not installed."""

from kiln_cli.main import main

main()
