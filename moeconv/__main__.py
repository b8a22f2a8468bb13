"""`python -m moeconv`."""

from moeconv.cli.main import main

main()
