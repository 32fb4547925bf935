"""What every process of pdserve shares: types, errors, config, clocks, wire format. No torch in here, except below `engine/`."""
