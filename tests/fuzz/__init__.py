"""What strangers' bytes may do to a parser: nothing but a value or one of our own errors."""
