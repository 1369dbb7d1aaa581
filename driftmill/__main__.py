"""`python -m driftmill` is the command line."""

from driftmill.cli import main

if __name__ == "__main__":
    main()
