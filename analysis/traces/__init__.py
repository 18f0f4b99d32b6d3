"""Routing traces: the file format, recording, importing, statistics from a trace, and what replay needs."""
