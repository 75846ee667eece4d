"""`python -m apportion`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder, where a downloaded model may have a numpy.py

    from apportion.cli.main import main

    main()
