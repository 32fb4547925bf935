"""The parts that decoder models are put together from. Each holds its weights and knows no model, no memory and no batch."""
