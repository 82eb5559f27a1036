"""What stands around the layers: accelerate() and its handle, hooks, schedules at work, graphs, plans, saving."""
