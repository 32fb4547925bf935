"""Steps of a worker without the worker: one process, no ports, a scheduler and an engine driven by hand, and timed."""
