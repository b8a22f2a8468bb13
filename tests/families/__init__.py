"""Families on the Hub: names, layouts, formats."""
