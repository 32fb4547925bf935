"""The store behind the router's caches: in this process, or in a Redis that all replicas share."""
