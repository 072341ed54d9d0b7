"""Measurements of the course's library beside what else does the same work."""
