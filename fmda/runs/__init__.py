"""What a run leaves on disk: whose folder it is, and its append-only records."""
