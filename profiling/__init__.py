"""Where the time goes: timing, costs, roofline, performance model, bottlenecks."""
