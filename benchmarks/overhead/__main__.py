"""The command: ``python -m benchmarks.overhead``."""

from benchmarks.overhead.variants import main

if __name__ == "__main__":
    main()
