"""A node's own hub: a hub to the workers of one machine, one worker to the hub of all nodes."""
