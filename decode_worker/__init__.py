"""The decode pool: reserves blocks, has prompts prefilled, and generates tokens."""
