"""The command: ``python -m benchmarks.harm``."""

from benchmarks.harm.judging import main

if __name__ == "__main__":
    main()
