"""What a batch is made of: loading, re-use and replay."""
