"""The roof: command line, pool manager, worker actors, cluster configuration. Nobody imports it."""
