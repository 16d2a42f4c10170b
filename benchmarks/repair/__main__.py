"""The command: ``python -m benchmarks.repair``."""

from benchmarks.repair.tables import main

if __name__ == "__main__":
    main()
