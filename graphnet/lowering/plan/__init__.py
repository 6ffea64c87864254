"""The plan of a step: its launches in order, and where every value lies."""
