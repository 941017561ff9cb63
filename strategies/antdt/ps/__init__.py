"""Parameter servers: asynchronous and semi-synchronous training, whose workers share no process group."""
