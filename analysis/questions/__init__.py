"""Questions about routing and about routing policies: each file holds one question, its method, section and figures."""
