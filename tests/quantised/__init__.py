"""Quantised experts of every format: real packings, exact to the bit."""
