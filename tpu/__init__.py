"""Where it runs: host settings, mesh, sharding rules. The ground half of this room imports no other room."""
