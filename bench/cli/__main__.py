"""`python -m bench.cli`, as under `ray job submit`."""

from bench.cli.main import main

raise SystemExit(main())
