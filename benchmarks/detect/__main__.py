"""The command: ``python -m benchmarks.detect``."""

from benchmarks.detect.scores import main

if __name__ == "__main__":
    main()
