"""FORMAT.md in code: values and their bytes, the strict reader, the cross-checks."""
