"""What the processes of a cluster logged: where it lies, run by run, and how it is read, merged and followed."""
