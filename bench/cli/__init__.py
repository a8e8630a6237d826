"""The command line: `mrd-bench VERB`, or `python -m bench.cli VERB`."""

from bench.cli.main import main

__all__ = ["main"]
