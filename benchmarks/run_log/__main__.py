"""The command: ``python -m benchmarks.run_log``."""

from benchmarks.run_log.cost import main

if __name__ == "__main__":
    main()
