"""What a rank does: times its steps, takes its shards, weighs its loss."""
