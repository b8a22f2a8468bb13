"""The console script, and `python -m moeconv`."""

import gc
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and end the process."""
    # what a command makes lives to its end, none of it in cycles; its modules first of all
    gc.disable()
    from moeconv.cli.main import main as carry_out

    carry_out()


if __name__ == "__main__":
    main()
