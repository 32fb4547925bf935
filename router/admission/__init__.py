"""Who may call how much, and who goes next: tenants, limits, the queue before the workers."""
