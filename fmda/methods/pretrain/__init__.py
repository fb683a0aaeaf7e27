"""Trainers of the small foundation models that ship with fmda."""
