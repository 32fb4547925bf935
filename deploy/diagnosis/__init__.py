"""What `pdserve doctor` looks at: the machine, the software, the configuration, and the links of a running cluster."""
