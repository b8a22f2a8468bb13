"""Moving bytes: worker pool, copy methods, sources and sinks."""
