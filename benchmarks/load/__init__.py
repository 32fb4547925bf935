"""The parts of the load generator: what to send and when (`plan`), sending it (`client`, `drive`), what came of it (`report`)."""
