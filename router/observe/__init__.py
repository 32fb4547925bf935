"""What a router knows of the requests that it has served, and of its last quarter of an hour."""
