"""Checkpoints in and out: file formats, hub ids, and the tables that rename and turn arrays."""
