"""The systems: one folder or file per method, each readable as the method section of its paper."""
