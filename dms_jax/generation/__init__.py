"""Generation: one request (`generate`), or many on one pool of pages (`Generator`)."""
