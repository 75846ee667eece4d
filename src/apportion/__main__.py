"""`python -m apportion`.

What Python itself imports before the first line here comes out of the current folder, as in any `python -m`; the
command `apportion` and `python -P -m apportion` import nothing from there."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder, where a downloaded model may have a numpy.py

    from apportion.cli.main import main

    main()
