"""Questions to one policy on held-out documents, each with its section and figure."""
