"""How policies are found: points scored on documents, the ladder of tolerances, the search; answers trained for one."""
