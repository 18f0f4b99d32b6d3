"""The published hypotheses, tested: criteria, their sections of the report and their figures."""
